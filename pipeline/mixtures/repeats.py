"""The same sound under several names: all of its names are of one recording, so that no split divides them."""

from collections.abc import Iterable


def join_by_sound(sounds: Iterable[tuple[str, bytes]]) -> tuple[dict[str, str], int]:
    """From (recording, digest of samples): the recording that stands for each that shares samples with others.

    Those that share none are not in it. The second number is how many sounds have been heard before.
    """
    recording_of: dict[bytes, str] = {}
    joined: dict[str, str] = {}
    n_repeats = 0

    def standing(name: str) -> str:
        while name in joined:
            name = joined[name]
        return name

    for recording, digest in sounds:
        n_repeats += digest in recording_of
        one, other = sorted((standing(recording), standing(recording_of.setdefault(digest, recording))))
        if one != other:
            joined[other] = one
    return {name: standing(name) for name in joined}, n_repeats
