"""From a command line or a recipe to the command that runs: a name and options in, the right `run(config)` called.

`table`: every command and the file that is it. `recipe`: a YAML file → stages; `run`, `batch`: the commands that run
recipes, `times`: what they took. `preflight`: inputs and outputs, asked before anything is read, `extras`: optional
packages, `idle`: options without effect, refused.
"""
