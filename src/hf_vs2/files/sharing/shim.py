"""The two lines of code in a checkpoint's folder by which transformers finds the classes of this package, or says that
it has to be installed."""

from ...version import INSTALLATION
from ..checkpoint_folder import SAE_TYPE, VS2_TYPE


SHIM_NAME = "hf_vs2_shim.py"
# Without hf_vs2 imported, transformers asks for trust_remote_code=True. With it, it looks into this file for the
# classes. (Imports inside `try` are left to the file; of others transformers says that PyPI has them.)
SHIM = f"""# The classes of this checkpoint come with the package hf_vs2.
try:
    from hf_vs2 import SAEConfig, SAEModel, VS2CLIPConfig, VS2CLIPForZeroShot
except ModuleNotFoundError as error:
    if error.name != "hf_vs2":
        raise
    raise ImportError("This checkpoint needs the package hf_vs2: {INSTALLATION}.") from error
"""
_CLASSES = {
    SAE_TYPE: {"AutoConfig": "SAEConfig", "AutoModel": "SAEModel"},
    VS2_TYPE: {
        "AutoConfig": "VS2CLIPConfig",
        "AutoModel": "VS2CLIPForZeroShot",
        "AutoModelForZeroShotImageClassification": "VS2CLIPForZeroShot",
    },
}


def auto_map(model_type: str) -> dict[str, str]:
    """The entry `auto_map` of a `config.json`, which leads to the shim."""
    return {auto: f"{SHIM_NAME.removesuffix('.py')}.{name}" for auto, name in _CLASSES[model_type].items()}
