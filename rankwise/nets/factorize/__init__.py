"""Networks that predict the low-rank factors of visual features, in one pass and for each input anew.

    net = build(FactorizerSettings("ResMLP", tokens=256, channels=2048, rank=128))
    net(normalised(features)).factors.product()          # (B, T, D), of rank 128
    save_factorizer(net, "results/ResMLP")

A new network is a subclass of `Factorizer` and a line in `ARCHITECTURES`.
"""
