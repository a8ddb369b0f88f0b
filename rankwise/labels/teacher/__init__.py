"""A teacher: a vision model behind the OpenAI protocol that labels images, asked no more often than it must be.

image ── the device's pixels, JPEG ──▶ questions ──▶ client ──▶ answers (checked) ──▶ votes ──▶ rows, or quarantine
                                          ▲ ledger: nothing in it is asked again, no budget is exceeded

`loopback` is a small server of the same protocol that labels by colours: no network needed.
"""
