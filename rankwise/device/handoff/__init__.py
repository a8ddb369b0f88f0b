"""Is what answers the model that was trained? A tuned model and its base of any trainer in, a server's or an app's
answers in, a verdict out (docs/handoff.md).

    TUNED, BASE, rows ── prepare ──▶ Cases: prompts, forced answers, log p under every hypothesis (written by cases.py)
    Cases ── ask (an OpenAI-compatible server) or a file of answers ── answers ──▶ what was told, place by place
    both ── verdict ──▶ tuned · base · partly tuned · another prompt · cannot tell ── page ──▶ handoff.json, the report

command.py is `rankwise validate` in this mode; variants.py makes the models that answers are compared with.
"""
