"""The lengths that texts are padded to: few, because each is a program."""

from collections.abc import Sequence

BUCKETS = (
    *(16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512),
    *(768, 1024, 1536, 2048, 4096, 8192, 16384),
)


def bucket_of(length: int, buckets: Sequence[int] = BUCKETS) -> int:
    """Return the smallest bucket that holds `length`.

    Raises:
      ValueError: the row is longer than the last bucket.
    """
    for bucket in buckets:
        if length <= bucket:
            return bucket
    raise ValueError(f"a row of {length} tokens: at most {buckets[-1]} fit into one step")
