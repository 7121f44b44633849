"""Who decodes whole patches on the device in use, chosen in one place; else decoding goes operation by operation."""

import os

from marlin_cli.engine import cuda_patches
from marlin_cli.engine.compiled_patches import CompiledPatches, compiled_patches
from marlin_cli.engine.cuda_patches import PatchDecoder
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.ops.dispatch import gpu


def patch_decoder(network: MegaByte, streams: int) -> PatchDecoder | CompiledPatches | None:
    """The decoder of whole patches, or None where they are decoded operation by operation.

    MARLIN_PATCHES in the environment overrules: `whole` asks for it on CUDA, `steps` refuses it on Metal.
    """
    if gpu() == "metal":
        return None if os.environ.get("MARLIN_PATCHES") == "steps" else compiled_patches(network, streams)
    return cuda_patches.patch_decoder(network, streams)
