"""What every command can be told: one dataclass per section, one per command, made of sections.

Standard library only, so that `rankwise --help` answers at once. `options.py` turns these into flags and reads
config files; a stage receives the finished object. Defaults are the documented ones; where a document's value
belongs to its own workflow (r 128 of the depth guide, say) it lives in that workflow's recipe.
"""

from __future__ import annotations

from rankwise.config.commands import (
    BatchConfig,
    CheckConfig,
    CompareConfig,
    CompressConfig,
    DemoConfig,
    DiffConfig,
    EvaluateConfig,
    ExtractConfig,
    FinetuneConfig,
    MergeConfig,
    RanksConfig,
    ReportConfig,
    RunConfig,
    TrainConfig,
)
from rankwise.config.sections import (
    DTYPES,
    SCORED_TASKS,
    SPLITS,
    TASKS,
    TOWERS,
    TRAINERS,
    DataSection,
    DepthSection,
    DepthUseSection,
    EstimateSection,
    GenerationSection,
    LoraSection,
    ModelSection,
    PhasesSection,
    ScoredData,
    SitesSection,
    SpectrumSection,
    TowersSection,
)
from rankwise.config.study import GridSection, ProbeSection, StudyConfig

__all__ = [
    "DTYPES",
    "SCORED_TASKS",
    "SPLITS",
    "TASKS",
    "TOWERS",
    "TRAINERS",
    "BatchConfig",
    "CheckConfig",
    "CompareConfig",
    "CompressConfig",
    "DataSection",
    "DemoConfig",
    "DepthSection",
    "DepthUseSection",
    "DiffConfig",
    "EstimateSection",
    "EvaluateConfig",
    "ExtractConfig",
    "FinetuneConfig",
    "GenerationSection",
    "GridSection",
    "LoraSection",
    "MergeConfig",
    "ModelSection",
    "PhasesSection",
    "ProbeSection",
    "RanksConfig",
    "ReportConfig",
    "RunConfig",
    "ScoredData",
    "SitesSection",
    "SpectrumSection",
    "StudyConfig",
    "TowersSection",
    "TrainConfig",
]
