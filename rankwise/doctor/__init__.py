"""`doctor`: what is installed and what is missing or broken, one line each with the command that mends it.

In: this machine. Out: lines or JSON, and exit code 1 where a command of the base install would fail. `command.py` needs
the standard library only and turns answers into lines; `probes.py` asks, each probe in a process of its own, since an
import may fail or crash.
"""
