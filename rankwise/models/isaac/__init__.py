"""Isaac (Perceptron AI's Isaac 0.1), implemented here from its architecture: transformers has no such class.

    configuration ─▶ vision ─┐
                positions ───┴▶ modeling            image_processing ─▶ processing

Importing `registration` makes the classes known to transformers' Auto classes, so a folder with the released files
loads by `AutoModelForImageTextToText` and `AutoProcessor` without code from elsewhere. No weights come with it.
"""
