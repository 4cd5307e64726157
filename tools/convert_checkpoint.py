"""Convert a checkpoint, as people save them, to one that quantize_catdog.py reads.

    python tools/convert_checkpoint.py THEIRS OURS

OURS is a new file, which CHECKPOINT=OURS quantizes. THEIRS may hold a state_dict
or a whole network, alone or under a usual key; the prefixes of DataParallel,
torch.compile and Lightning are taken off. Nothing in it is executed: torch's safe
loader builds tensors and plain values, and each object of a pickled network is
replaced by a namespace with its attributes.
"""
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
import quantize_catdog as script

KEYS = "model", "state_dict", "model_state_dict", "net"
PREFIXES = re.compile(r"^((module|_orig_mod|model)\.)+")
# classes in a pickled network; each is loaded as a SimpleNamespace
PICKLED = [f"{module}.{name}" for module in ("__main__", "quantize_catdog", "model", "models")
           for name in ("CNN_Model", "Conv2d", "Linear", "MaxPool2d")]
PICKLED += [f"torch.nn.modules.{name}" for name in (
    "conv.Conv2d", "batchnorm.BatchNorm2d", "activation.ReLU", "activation.Softmax",
    "pooling.MaxPool2d", "linear.Linear")]


def weights_in(saved):
    """{name: value} of what people save: a state_dict or a network, alone or under a usual key."""
    for key in KEYS:
        if isinstance(saved, dict) and key in saved:
            saved = saved[key]
    if isinstance(saved, SimpleNamespace):      # a network: tensors and eps of its layers
        saved = {f"{name}.{key}": value for name, layer in vars(saved).get("_modules", {}).items()
                 for key, value in (vars(layer) | layer._parameters | layer._buffers).items()}
    if not isinstance(saved, dict):
        return {}
    return {PREFIXES.sub("", str(name)): value for name, value in saved.items()}


def state_dict_of(values):
    """The state_dict of a CNN_Model from these values, as far as they have its names."""
    model = script.CNN_Model()
    state = {name: values[name] for name in model.state_dict()
             if isinstance(values.get(name), torch.Tensor)}
    for layer in script.LAYERS:
        eps, variance = values.get(f"{layer.bn}.eps"), state.get(f"{layer.bn}.running_var")
        if isinstance(eps, (int, float)) and variance is not None:
            # the script's batch norms have torch's own eps: the difference goes into the variance
            state[f"{layer.bn}.running_var"] = variance + (eps - model.get_submodule(layer.bn).eps)
    return state


def convert(path):
    """The bytes of {"model": state_dict}, which the script can load. Raises InputError."""
    with torch.serialization.safe_globals([(SimpleNamespace, name) for name in PICKLED]):
        try:
            saved, name = script.read_checkpoint(path)
            values = weights_in(saved)
            state = state_dict_of(values)
        except (AttributeError, TypeError, RuntimeError):       # a namespace that is no layer
            raise script.InputError(f"checkpoint {path} holds no network of this kind") from None
    if isinstance(saved, dict) and "recipe" in saved:
        raise script.InputError(f"{name} is the INT8 network of a run: give FP32 weights")
    script.fill(script.CNN_Model(), state or values, name)      # or InputError
    file = io.BytesIO()
    torch.save({"model": state}, file)
    return file.getvalue()


def main():
    if len(sys.argv) != 3 or {"--help", "-h"} & set(sys.argv):
        print(__doc__)
        sys.exit(0 if {"--help", "-h"} & set(sys.argv) else 2)
    theirs, ours = map(Path, sys.argv[1:])
    if ours.exists():
        raise script.InputError(f"{ours} exists already: name a new file")
    try:
        content = convert(theirs)
    except script.InputError as error:          # without the advice to use this tool
        advice = r"(, or use |: )tools/convert_checkpoint\.py.*"
        raise script.InputError(re.sub(advice, "", str(error))) from None
    script.write_files(ours.parent, {ours.name: content})
    print(f"wrote {script.printable(str(ours))}, which quantize_catdog.py reads as CHECKPOINT")


if __name__ == "__main__":
    sys.excepthook = script.end_in_one_line
    main()
