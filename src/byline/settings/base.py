"""What a setting is: a named benchmark with data, a model, a training recipe and a bank recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from byline.features import Exact, Features
from byline.task import Task
from byline.training import Recipe, Trainer

Data = tuple[Dataset[Any], Dataset[Any]]


@dataclass(frozen=True)
class BankRecipe:
    """How the ground truth of a setting is made; the arguments of `byline.retrain`.

    Attributes:
        subsets: Number of random training subsets.
        fraction: Their size, as a share of the training set.
        seeds: Models trained on each. The more of them are averaged, the less of what they say is chance: the LDS of
            the same scores rises with the ceiling.
        seed: What the subsets and the models' seeds are drawn from.
    """

    subsets: int = 50
    fraction: float = 0.5
    seeds: int = 6
    seed: int = 0


def widened(setting: Setting, width: int, **others: Any) -> Setting:
    """The setting with a model of another width, which its ``build`` takes, and with other fields."""
    build: Callable[..., nn.Module] = setting.build
    return replace(setting, build=partial(build, width=width), width=width, **others)


@dataclass(frozen=True)
class Setting:
    """A named benchmark.

    Attributes:
        name: Its name on the command line.
        description: One sentence for a list.
        load: Reads the data: (train set, test set); called once, at the first use of either.
        build: Makes a fresh model, its weights from torch's global generator.
        recipe: How its models are trained.
        bank_recipe: How its ground truth is made.
        output: The output that is attributed, as `byline.Task` takes it.
        image_shape: (height, width) or (3, height, width) of an example, when it is a picture.
        pixel_range: The values that stand for black and white.
        class_names: Names of the labels, in their order.
        on_folder: ``on_folder(setting, folder)`` gives the setting on the data files of a folder, where it reads files.
        width: Of the model, where it has several; 0 where it has one.
        at_width: ``at_width(setting, width)`` gives it with a wider or narrower model, where the model has a width.
        simplest: Makes the simplest model of the same inputs and outputs, a linear one: what data alone say.
        features: Makes the features of its comparison; exact ones where the gradients are small enough to be kept.
        batch_size: Examples that are differentiated at a time.
        group: Models that are trained side by side; of larger models one at a time is as quick.
        owners: Gives what is known of each training and of each test example (collection and title, module and
            function), plain data in their order.
        texts: Gives each training and each test example as text, where they are texts.
        read_text: Makes an example of a text, for who brings one of their own; raises ValueError for what is none.
        source: Says in a sentence where the data were found, and in which version.
        shortened: ``shortened(setting)`` gives it with less data and a smaller model, for the short form.
    """

    name: str
    description: str
    load: Callable[[], Data] = field(repr=False)
    build: Callable[[], nn.Module] = field(repr=False)
    recipe: Recipe
    bank_recipe: BankRecipe = field(default_factory=BankRecipe)
    output: Any = "classification"
    image_shape: tuple[int, ...] | None = None
    pixel_range: tuple[float, float] = (0.0, 1.0)
    class_names: tuple[str, ...] = field(default=(), repr=False)
    on_folder: Callable[[Setting, Path], Setting] | None = field(default=None, repr=False)
    width: int = 0
    at_width: Callable[[Setting, int], Setting] | None = field(default=None, repr=False)
    simplest: Callable[[], nn.Module] | None = field(default=None, repr=False)
    features: Callable[[], Features] = field(default=Exact, repr=False)
    batch_size: int = 256
    group: int = 25
    owners: Callable[[], tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]] | None = field(
        default=None, repr=False
    )
    texts: Callable[[], tuple[Sequence[str], Sequence[str]]] | None = field(default=None, repr=False)
    read_text: Callable[[str], Any] | None = field(default=None, repr=False)
    source: Callable[[], str] | None = field(default=None, repr=False)
    shortened: Callable[[Setting], Setting] | None = field(default=None, repr=False)

    @cached_property
    def _data(self) -> Data:
        return self.load()

    @property
    def train_set(self) -> Any:
        """Training data: a map-style dataset."""
        return self._data[0]

    @property
    def test_set(self) -> Any:
        """Test data, the examples whose outputs are explained."""
        return self._data[1]

    def task(self, model: nn.Module | None = None) -> Task:
        """The task of this setting, for a trained model (or a fresh one, when only its shape matters)."""
        return Task((model or self.build()).eval(), output=self.output)

    def trainer(self, **options: Any) -> Trainer:
        """Trains this setting's models; `options` are the other fields of `Trainer`."""
        return Trainer(self.build, self.recipe, self.task().loss, **{"group": self.group, **options})

    def variant(self, folder: Path | None = None, width: int | None = None) -> Setting:
        """The setting on other data files, at another width, or itself.

        Raises:
            ValueError: If the setting reads no files, or its model has no width.
        """
        setting = self
        if folder is not None:
            if setting.on_folder is None:
                raise ValueError(f"{self.name} brings its own data; --data is for settings that read files")
            setting = setting.on_folder(setting, folder)
        if width is not None:
            if setting.at_width is None:
                raise ValueError(f"the model of {self.name} has one width; --width is for settings that have several")
            if width < 1:
                raise ValueError(f"width is {width}; expected at least 1")
            setting = setting.at_width(setting, width)
        return setting
