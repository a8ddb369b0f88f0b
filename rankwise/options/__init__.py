"""What each command can be told: one dataclass per section, one per command, made of sections.

`field`: what an option is, from flags and config files to typed values; `flags`: the command line's parser. `sections`:
the options that commands share; `commands`, `label`, `study`, `features`: a dataclass per command. Standard library
only, so that `rankwise --help` answers at once. A section is the setting: lower rooms take it as it is.
"""
