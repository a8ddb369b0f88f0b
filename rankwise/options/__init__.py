"""What every command can be told: one dataclass per section, one per command, made of sections.

Standard library only, so that `rankwise --help` answers at once. `options/field.py` turns these into flags and reads
config files; a stage receives the finished object. Defaults are the documented ones; where a document's value
belongs to its own workflow (r 128 of the depth guide, say) it lives in that workflow's recipe.
"""
