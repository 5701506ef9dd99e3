"""Augmentations: grid -> grid, by name, in the groups that a self-edit switches on.

    basic   rotate, flip, transpose, reflect (a grid joined with its mirror image), translate
    size    each cell becomes several
    chain   a basic one, then twice the resolution
    repeat  the grid beside itself

Rows are counted downward, rotations are counterclockwise, and a number in a name is the factor by
which the grid grows. All are injective; `INVERSES` undoes each. What needs chance (translation,
colors, the order of examples) takes a `numpy.random.Generator`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from seal_jax.tasks.arc.grids import NUM_COLORS, Example

Augmentation = Callable[[np.ndarray], np.ndarray]

FACTORS = (2, 3)
MAX_SHIFT = 4  # cells, of a random translation along each side


class _Pair(NamedTuple):
    forward: Augmentation
    inverse: Augmentation


def _rotate(quarters: int) -> _Pair:
    return _Pair(lambda grid: np.rot90(grid, quarters), lambda grid: np.rot90(grid, -quarters))


def _flip(axis: int) -> _Pair:
    flip = partial(np.flip, axis=axis)
    return _Pair(flip, flip)


def _reflect(axis: int, mirror_first: bool) -> _Pair:
    def join(grid: np.ndarray) -> np.ndarray:
        mirror = np.flip(grid, axis)
        return np.concatenate((mirror, grid) if mirror_first else (grid, mirror), axis)

    def undo(grid: np.ndarray) -> np.ndarray:
        half = grid.shape[axis] // 2
        start = grid.shape[axis] - half if mirror_first else 0
        return np.take(grid, range(start, start + half), axis)

    return _Pair(join, undo)


def _enlarge(height: int, width: int) -> _Pair:
    return _Pair(
        lambda grid: np.repeat(np.repeat(grid, height, 0), width, 1),
        lambda grid: grid[::height, ::width],
    )


def _repeat(height: int, width: int) -> _Pair:
    return _Pair(
        lambda grid: np.tile(grid, (height, width)),
        lambda grid: grid[: grid.shape[0] // height, : grid.shape[1] // width],
    )


def _chain(first: _Pair, second: _Pair) -> _Pair:
    return _Pair(
        lambda grid: second.forward(first.forward(grid)),
        lambda grid: first.inverse(second.inverse(grid)),
    )


_RIGID = {
    "rotate_90": _rotate(1),
    "rotate_270": _rotate(3),
    "rotate_180": _rotate(2),
    "flip_rows": _flip(0),
    "flip_columns": _flip(1),
    "transpose": _Pair(np.transpose, np.transpose),
}
_REFLECT = {
    "reflect_rows_reversed": _reflect(0, True),
    "reflect_columns_reversed": _reflect(1, True),
    "reflect_rows": _reflect(0, False),
    "reflect_columns": _reflect(1, False),
}


def _grown_by(f: int) -> dict[str, dict[str, _Pair]]:
    """Return the groups of augmentations that grow a grid by the factor f."""
    return {
        "size": {
            f"increase_resolution_{f}": _enlarge(f, f),
            f"increase_height_{f}": _enlarge(f, 1),
            f"increase_width_{f}": _enlarge(1, f),
        },
        "chain": {
            f"{name}_then_resolution_{f}": _chain(pair, _enlarge(f, f))
            for name, pair in _RIGID.items()
        },
        "repeat": {
            f"repeat_rows_{f}": _repeat(f, 1),
            f"repeat_columns_{f}": _repeat(1, f),
            f"repeat_both_{f}": _repeat(f, f),
        },
    }


_GROWN = [_grown_by(f) for f in FACTORS]
_PAIRS = _RIGID | _REFLECT
for _group in (group for groups in _GROWN for group in groups.values()):
    _PAIRS |= _group
AUGMENTATIONS: dict[str, Augmentation] = {name: pair.forward for name, pair in _PAIRS.items()}
INVERSES: dict[str, Augmentation] = {name: pair.inverse for name, pair in _PAIRS.items()}

# Those that lose nothing whichever grid is undone, an answer of any shape included.
RIGID: tuple[str, ...] = tuple(_RIGID)

# What a self-edit switches on. As in the paper's protocol every factor is 2. 'basic' has a random
# translation too, which training_data.py adds: it needs a generator.
GROUPS: dict[str, tuple[str, ...]] = {"basic": (*_RIGID, *_REFLECT)}
GROUPS |= {name: tuple(group) for name, group in _GROWN[0].items()}


def check_groups(groups: Sequence[str]) -> None:
    """Raise ValueError for a name that is not in GROUPS."""
    for group in groups:
        if group not in GROUPS:
            raise ValueError(f"unknown group {group!r}: expected some of {', '.join(GROUPS)}")


def translation(rng: np.random.Generator) -> tuple[Augmentation, Augmentation]:
    """Draw a translation of 1 to MAX_SHIFT cells down and right, and its inverse.

    What leaves a grid on one side enters on the other, so nothing is lost.
    """
    shift = tuple(int(s) for s in rng.integers(1, MAX_SHIFT + 1, size=2))
    back = tuple(-s for s in shift)
    return partial(np.roll, shift=shift, axis=(0, 1)), partial(np.roll, shift=back, axis=(0, 1))


def color_permutation(rng: np.random.Generator) -> tuple[Augmentation, Augmentation]:
    """Draw a permutation of the colors 1 to 9, and its inverse. 0, the background, stays."""
    colors = np.concatenate([[0], 1 + rng.permutation(NUM_COLORS - 1)]).astype(np.int8)
    return partial(np.take, colors), partial(np.take, np.argsort(colors).astype(np.int8))


def permute_examples(examples: Sequence[Example], rng: np.random.Generator) -> tuple[Example, ...]:
    """Return the examples in a random order."""
    return tuple(examples[i] for i in rng.permutation(len(examples)))


def augment_examples(
    examples: Sequence[Example], augmentation: Augmentation
) -> tuple[Example, ...]:
    """Apply one augmentation to every input and output."""
    return tuple(Example(augmentation(e.input), augmentation(e.output)) for e in examples)
