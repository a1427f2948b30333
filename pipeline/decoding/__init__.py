"""Image bytes to uint8 pixels, as the weights ask.

It knows Pillow and libjpeg-turbo. It does not know shards, backbones or where pixels go.
"""
