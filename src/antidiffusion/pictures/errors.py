"""What every refusal of a picture is."""


class PictureError(ValueError):
    """A picture that cannot be read or written, in one sentence: expected, got, remedy."""
