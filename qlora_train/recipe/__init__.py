"""The recipe of a run: its keys and defaults (schema.py), reading and checking them."""

from qlora_train.recipe.schema import (
    MOST_SAMPLE_TOKENS,
    DataSection,
    DataSource,
    EarlyStopping,
    LoraSection,
    MemorySection,
    ModelSection,
    NewToken,
    Recipe,
    Samples,
    TrainingSection,
    load_recipe,
)

__all__ = [
    "MOST_SAMPLE_TOKENS",
    "DataSection",
    "DataSource",
    "EarlyStopping",
    "LoraSection",
    "MemorySection",
    "ModelSection",
    "NewToken",
    "Recipe",
    "Samples",
    "TrainingSection",
    "load_recipe",
]
