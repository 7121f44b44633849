"""The kinds of input, each with its generator."""

from .caches import cache
from .case import Generator
from .configs import byt5_config, generation_config, native_config, relative_config, sizes
from .corpora import packed, parquet, places, rows
from .gguf_files import gguf
from .lines import pairs, prompt_bytes, prompts, results
from .networks import network_config, network_tensors
from .options import options
from .pickles import legacy, zipped
from .recipes import corpus_recipe, packing_recipe
from .run_states import prompt_state, unfinished_surprise
from .safetensors_files import safetensors, shards
from .statistics_files import finished, unfinished

KINDS: dict[str, Generator] = {
    "safetensors": safetensors,
    "shards": shards,
    "config of a MegaByte": native_config,
    "config of a ByT5": byt5_config,
    "config of a ByGPT5 or GBST": relative_config,
    "config of another network": network_config,
    "tensors of another network": network_tensors,
    "sizes in a config": sizes,
    "generation_config": generation_config,
    "pickle in a zip": zipped,
    "pickle, legacy": legacy,
    "GGUF": gguf,
    "rows of JSON": rows,
    "packed corpus": packed,
    "parquet": parquet,
    "places of a corpus": places,
    "recipe of a corpus": corpus_recipe,
    "recipe of formats": packing_recipe,
    "statistics": finished,
    "unfinished statistics": unfinished,
    "state of a prompt": prompt_state,
    "unfinished surprise": unfinished_surprise,
    "prompts": prompts,
    "prompt": prompt_bytes,
    "pairs": pairs,
    "results": results,
    "cache": cache,
    "options": options,
}
