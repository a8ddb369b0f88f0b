"""The mathematics: tensors and numbers in, frozen values out; no disk, no model, no option.

Sites: `site` (a matrix by its module path), `geometry` (an image's tokens). Spectra: `spectrum`, `measure` (how one is
computed), `factors` (low-rank products). Ranks: `plan`, `allocate`, `rank_budget` (while training). Phases: `phase`,
`schedule` (as people write them). `rounding`: what a floating-point type makes of a change.
"""
