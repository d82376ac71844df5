"""What a Hugging Face config may ask for and our decoder does not compute."""


class UnsupportedError(ValueError):
    """Another architecture, or a setting of ours that our decoder does not compute: transformers itself may."""
