"""A teacher: a vision model behind the OpenAI protocol that labels images, asked no more often than it must be.

image ── the device's pixels, JPEG ──▶ client ──▶ ledger ──▶ answers (checked) ──▶ votes ──▶ rows, or quarantine
                                        ▲ price (budget)      ▲ nothing that is in the ledger is asked again

`asking` joins them; `loopback` is a small server of the same protocol that labels by colours: no network needed.
"""
