"""Trees of known data sets, by label.

CIFAR-100's is its authors' own: 20 superclasses of 5 classes. The others are ours. They were drawn
from what the classes are (how a thing is worn, how a digit's stroke runs) before any net was looked
at: a tree made from a net's confusions would find that net's mistakes mild by construction.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qkd_jax.hierarchy.tree import ClassTree

# Krizhevsky 2009, "Learning multiple layers of features from tiny images", the list of classes.
# The set's fine labels are these names in alphabetical order.
CIFAR100 = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}

# Machines by where they go, animals by zoological class; the pets are the pair that also lives in
# one place and poses alike.
CIFAR10 = {
    "object": {
        "vehicle": {"road vehicle": ["automobile", "truck"], "airplane": None, "ship": None},
        "animal": {
            "mammal": {"pet": ["cat", "dog"], "hoofed": ["deer", "horse"]},
            "bird": None,
            "frog": None,
        },
    }
}
CIFAR10_LABELS = "airplane automobile bird cat deer dog frog horse ship truck".split()

# By the part of the body it is worn on, then by what it is worn with: a shirt taken for a T-shirt
# is a mild mistake, for a coat a larger one, for a sneaker or a bag the largest.
FASHION = {
    "article": {
        "clothes": {
            "top": {"next to the skin": ["T-shirt/top", "Shirt"], "over it": ["Pullover", "Coat"]},
            "Dress": None,
            "Trouser": None,
        },
        "footwear": {"Sandal": None, "closed shoe": ["Sneaker", "Ankle boot"]},
        "Bag": None,
    }
}
FASHION_LABELS = (
    "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
)

# By the topology of the stroke (does it close, how often), then by its parts (straight or curved).
# Written by hand, 4 is mostly open.
DIGITS = {
    "digit": {
        "closed": {"one loop": ["0", "6", "9"], "8": None},
        "open": {"straight strokes": ["1", "4", "7"], "curves": ["2", "3", "5"]},
    }
}


def _cifar100() -> ClassTree:
    groups = {name: classes.split() for name, classes in CIFAR100.items()}
    labels = sorted(name for classes in groups.values() for name in classes)
    return ClassTree.from_dict({"object": groups}).with_classes(labels)


def _of(nested: Mapping[Any, Any], labels: Sequence[str]) -> Callable[[], ClassTree]:
    # One object a data set: compiled steps are found by it.
    return functools.cache(lambda: ClassTree.from_dict(nested).with_classes(labels))


TREES: dict[str, Callable[[], ClassTree]] = {
    "digits": _of(DIGITS, [str(digit) for digit in range(10)]),
    "digits28": _of(DIGITS, [str(digit) for digit in range(10)]),
    "mnist": _of(DIGITS, [str(digit) for digit in range(10)]),
    "fashion_mnist": _of(FASHION, FASHION_LABELS),
    "cifar10": _of(CIFAR10, CIFAR10_LABELS),
    "cifar100": functools.cache(_cifar100),
}
