"""The licences of the published models: what a model card of a LoRA says, since a LoRA is a derivative of its base.

The sentences say the main point for people and replace no reading: the link leads to the text that binds.
"""

from __future__ import annotations

from trainer.spec.family import Licence


def flux_dev(repository: str) -> Licence:
    """Of FLUX.1 dev and Krea, each of which has a copy in its own repository."""
    return Licence(
        id="other",
        name="flux-1-dev-non-commercial-license",
        link=f"https://huggingface.co/{repository}/blob/main/LICENSE.md",
        allows=(
            "Non-commercial use of the model and of LoRAs of it; images may be used commercially, but not to train a "
            "model that competes with it."
        ),
    )


def flux2(repository: str) -> Licence:
    """Of FLUX.2 dev and klein 9B, each of which has a copy in its own repository."""
    return Licence(
        id="other",
        name="flux-non-commercial-license",
        link=f"https://huggingface.co/{repository}/blob/main/LICENSE.md",
        allows=(
            "Non-commercial use of the model and of LoRAs of it; images may be used commercially, but not to train a "
            "model that competes with it."
        ),
    )


KREA_2 = Licence(
    id="other",
    name="krea-2-community-license",
    link="https://www.krea.ai/krea-2-licensing",
    allows=(
        "Free, for commercial use too, to those with less than a million US dollars of yearly revenue; whoever passes "
        "a LoRA on adds the licence, says that the model was changed, and begins the LoRA's name with Krea."
    ),
)
APACHE = Licence(
    id="apache-2.0",
    name="Apache License 2.0",
    link="https://www.apache.org/licenses/LICENSE-2.0",
    allows="Any use, commercial too, with the licence's text and notices kept.",
)
OPENRAIL = Licence(
    id="openrail++",
    name="CreativeML Open RAIL++-M",
    link="https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
    allows="Any use, commercial too, but for the harmful ones that it lists; whoever passes a LoRA on passes that on.",
)


def stability_community(repository: str) -> Licence:
    """Of Stable Diffusion 3 and 3.5."""
    return Licence(
        id="other",
        name="stabilityai-ai-community",
        link=f"https://huggingface.co/{repository}/blob/main/LICENSE.md",
        allows=(
            "Free for research, for non-commercial use, and for commercial use by those with less than a million US "
            "dollars of yearly revenue; others need a licence from Stability AI."
        ),
    )
