"""How the training pictures are drawn and captioned: `python -m ldm.data.pictures.build` makes them all again."""
