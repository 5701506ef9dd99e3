"""The door: a config's sections become the NamedTuples that the stages take."""

from ml_collections import ConfigDict

from seal_jax.config.load import task_arguments
from seal_jax.types import (
    AnswerSettings,
    CheckpointSettings,
    EvalSettings,
    InnerSettings,
    ModelSettings,
    OuterSettings,
    RewardSettings,
    SampleSettings,
    Settings,
)


def settings_of(config: ConfigDict) -> Settings:
    """Return a validated config as values."""
    plain = config.to_dict()
    return Settings(
        seed=config.seed,
        model=ModelSettings(**plain["model"]),
        task=task_arguments(config),
        sample=SampleSettings(**plain["sample"]),
        answer=AnswerSettings(**plain["answer"]),
        inner=InnerSettings(**plain["inner"]),
        reward=RewardSettings(**plain["reward"]),
        outer=OuterSettings(**plain["outer"]),
        eval=EvalSettings(**plain["eval"]),
        checkpoint=CheckpointSettings(**plain["checkpoint"]),
        mesh=plain["mesh"],
        rules=tuple(plain["sharding"].items()),
    )
