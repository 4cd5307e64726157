"""What stands out in a quantized network, for tools/explain.py: hints on what to look at next."""
import quantize_catdog as script

OUTLIER = 100       # times the median: a channel this strong leaves few integers to the others


def hints(report, folded, int8_model):
    """At most three hints on what to look at next; none where nothing stands out."""
    top1, (low, high) = report["fp32"]["top1"], report["fp32"]["interval95"]
    images, sqnr = report["images"], report["logit_sqnr_db"]
    chance = 100 / len(script.CLASSES)
    bias_bit = int8_model.recipe["BIAS_BIT"]
    biases = {layer.name: int8_model.get_submodule(layer.name).bias.long()
              for layer in script.LAYERS}
    clipped = counts({name: bias.abs() == 2**(bias_bit - 1) - 1 for name, bias in biases.items()})
    silent = counts({name: ranges == 0 for name, ranges in folded.ranges.items()})
    times, name = max((outlier(folded.ranges[layer.output]), layer.output)
                      for layer in script.LAYERS[:-1])
    strongest = (f" {name}'s strongest channel is {times:,.0f} times its median one, and all share "
                 "one scale." if times >= OUTLIER else "")
    found = [
        (high < chance,
         f"FP32 Top-1 of {top1:.1f} % is worse than guessing: are cat and dog swapped, or were "
         "the weights trained on other classes?"),
        (low < chance <= high and images["evaluated"] >= script.SAMPLE,
         f"FP32 Top-1 of {top1:.1f} % is near guessing: were the weights trained on pixels from 0 "
         "to 255, and on these labels?"),
        (clipped, f"BIAS_BIT = {bias_bit} clips biases ({clipped}): more bits avoid it."),
        (sqnr is not None and sqnr < script.LOW_SQNR,
         f"Logit SQNR is below {script.LOW_SQNR} dB: see where the error arises.{strongest}"),
        (silent, f"Channels never active in calibration (often harmless): {silent}."),
        (images["calibrated"] < script.SAMPLE,
         f"Only {images['calibrated']} calibration pictures: other pictures may exceed their "
         f"ranges. {script.SAMPLE} or more are better.")]
    return [hint for applies, hint in found if applies][:3]


def counts(masks):
    """{name: mask} -> "2 of 8 in cv4", say, for those that are true anywhere."""
    return ", ".join(f"{int(mask.sum())} of {len(mask)} in {name}" for name, mask in masks.items()
                     if mask.any())


def outlier(ranges):
    """The strongest channel's range divided by the median of the active ones."""
    active = ranges[ranges > 0]
    return (active.max() / active.median()).item() if len(active) else 0
