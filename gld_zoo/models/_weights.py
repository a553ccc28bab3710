"""What is common to the weights that ship: where they lie, and the classes they tell apart."""

from pathlib import Path

WEIGHTS = Path(__file__).parent.parent / "weights"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange
orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit
raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel
streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip
turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR100_LABELS = tuple(_CIFAR100.split())


def embedded(weights: str) -> dict[str, str]:
    """Return what a timm pretrained cfg holds of the file of `weights` (arch.tag), if any."""
    return dict(file=str(WEIGHTS / f"{weights}.safetensors")) if weights else {}
