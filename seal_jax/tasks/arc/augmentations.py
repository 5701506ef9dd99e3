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

import numpy as np

from seal_jax.tasks.arc.grids import NUM_COLORS, Example

Augmentation = Callable[[np.ndarray], np.ndarray]

FACTORS = (2, 3)
MAX_SHIFT = 4  # cells, of a random translation along each side


def _rotate(quarters: int, grid: np.ndarray) -> np.ndarray:
    return np.rot90(grid, quarters)


def _flip(axis: int, grid: np.ndarray) -> np.ndarray:
    return np.flip(grid, axis)


def _reflect(axis: int, mirror_first: bool, grid: np.ndarray) -> np.ndarray:
    pair = (np.flip(grid, axis), grid) if mirror_first else (grid, np.flip(grid, axis))
    return np.concatenate(pair, axis)


def _enlarge(height: int, width: int, grid: np.ndarray) -> np.ndarray:
    return np.repeat(np.repeat(grid, height, 0), width, 1)


def _shrink(height: int, width: int, grid: np.ndarray) -> np.ndarray:
    return grid[::height, ::width]


def _tile(height: int, width: int, grid: np.ndarray) -> np.ndarray:
    return np.tile(grid, (height, width))


def _first_of(height: int, width: int, grid: np.ndarray) -> np.ndarray:
    return grid[: grid.shape[0] // height, : grid.shape[1] // width]


def _last_of(height: int, width: int, grid: np.ndarray) -> np.ndarray:
    return grid[grid.shape[0] - grid.shape[0] // height :, grid.shape[1] - grid.shape[1] // width :]


def _then(first: Augmentation, second: Augmentation, grid: np.ndarray) -> np.ndarray:
    return second(first(grid))


# name: (augmentation, its inverse)
_RIGID = {
    "rotate_90": (partial(_rotate, 1), partial(_rotate, 3)),
    "rotate_270": (partial(_rotate, 3), partial(_rotate, 1)),
    "rotate_180": (partial(_rotate, 2), partial(_rotate, 2)),
    "flip_rows": (partial(_flip, 0), partial(_flip, 0)),
    "flip_columns": (partial(_flip, 1), partial(_flip, 1)),
    "transpose": (np.transpose, np.transpose),
}
_REFLECT = {
    "reflect_rows_reversed": (partial(_reflect, 0, True), partial(_last_of, 2, 1)),
    "reflect_columns_reversed": (partial(_reflect, 1, True), partial(_last_of, 1, 2)),
    "reflect_rows": (partial(_reflect, 0, False), partial(_first_of, 2, 1)),
    "reflect_columns": (partial(_reflect, 1, False), partial(_first_of, 1, 2)),
}


def _grown_by(f: int) -> dict[str, dict[str, tuple[Augmentation, Augmentation]]]:
    """Return the groups of augmentations that grow a grid by the factor f."""
    enlarge, shrink = partial(_enlarge, f, f), partial(_shrink, f, f)
    size = {
        f"increase_resolution_{f}": (enlarge, shrink),
        f"increase_height_{f}": (partial(_enlarge, f, 1), partial(_shrink, f, 1)),
        f"increase_width_{f}": (partial(_enlarge, 1, f), partial(_shrink, 1, f)),
    }
    chain = {
        f"{name}_then_resolution_{f}": (
            partial(_then, forward, enlarge),
            partial(_then, shrink, inverse),
        )
        for name, (forward, inverse) in _RIGID.items()
    }
    repeat = {
        f"repeat_rows_{f}": (partial(_tile, f, 1), partial(_first_of, f, 1)),
        f"repeat_columns_{f}": (partial(_tile, 1, f), partial(_first_of, 1, f)),
        f"repeat_both_{f}": (partial(_tile, f, f), partial(_first_of, f, f)),
    }
    return {"size": size, "chain": chain, "repeat": repeat}


_GROWN = [_grown_by(f) for f in FACTORS]
_PAIRS = _RIGID | _REFLECT
for _groups in _GROWN:
    for _group in _groups.values():
        _PAIRS = _PAIRS | _group

AUGMENTATIONS: dict[str, Augmentation] = {name: pair[0] for name, pair in _PAIRS.items()}
INVERSES: dict[str, Augmentation] = {name: pair[1] for name, pair in _PAIRS.items()}

# Those that lose nothing whichever grid is undone, an answer of any shape included.
RIGID: tuple[str, ...] = tuple(_RIGID)

# What a self-edit switches on. As in the paper's protocol every factor is 2. 'basic' has a random
# translation too, which training_data.py adds: it needs a generator.
GROUPS: dict[str, tuple[str, ...]] = {
    "basic": tuple(_RIGID | _REFLECT),
    **{name: tuple(group) for name, group in _GROWN[0].items()},
}


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
