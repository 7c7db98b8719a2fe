# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lesions in arrays: `hae_jax.Localizer`
#
# This notebook shows how to find lesions in NumPy arrays with `Localizer`. It runs on the phantom (template anatomy
# with drawn lesions) with the network that comes with the program. It needs neither data nor a GPU, and takes a minute
# or two on two cores.
#
# **Research use only. Not a medical device; not for diagnosis or treatment.**
#
# In a clone of the repository, run `pip install . jupyterlab ipywidgets`. Then open this notebook. `localize.py` is the
# same notebook as a script (`jupytext --sync localize.ipynb` synchronises both).

# %%
import dataclasses
import tempfile

import ipywidgets
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from hae_jax import Localizer, forward_process
from hae_jax.data.cases import find_cases, read_case
from hae_jax.diffusion.process import Process
from hae_jax.diffusion.schedule import make_schedule
from hae_jax.localization.denoisers import Denoisers, step_noise
from hae_jax.localization.forward_process import ForwardSettings
from hae_jax.phantom.cohort import make_phantom

# %% [markdown]
# ## A case
#
# The data are three small phantom subjects. `read_case` reads the modalities of a case and turns them to LPS: right to
# left, front to back, bottom to top. For your own data, `find_cases` finds cases in BraTS folders and the other
# layouts of docs/data.md. Only every fifth slice is kept, so that the notebook runs faster.

# %%
def thinned(case, step=5):
    """Every fifth slice of a case. The third column of the affine becomes five times as long."""
    return dataclasses.replace(case, volumes=case.volumes[:, :, ::step], mask=case.mask[:, :, ::step],
                               affine=case.affine @ np.diag([1, 1, step, 1]))


folder = make_phantom(tempfile.mkdtemp() + "/phantom", subjects=3, size=0.3, workers=1, progress=False)
cases = [thinned(read_case(files)) for files in find_cases(folder)]
case = cases[0]
print(case.name, case.volumes.shape, "X, Y, Z and flair, t1, t1ce, t2")

# %% [markdown]
# `Localizer.load` loads shipped weights by name, a run folder of `train.py`, or a folder of exported weights. Call the
# localizer with a volume of raw intensities with background 0, and with the affine from voxels to mm.

# %%
localizer = Localizer.load("phantom", batch_size=8)
found = localizer(case.volumes, case.affine, name=case.name)
print("mask:", found.mask.shape, f"{found.mask.sum() * abs(np.linalg.det(case.affine[:3, :3])) / 1000:.0f} ml")
print("ground truth:", f"{case.mask.sum() * abs(np.linalg.det(case.affine[:3, :3])) / 1000:.0f} ml")
print("slices called lesion slices:", found.slice_index[found.lesion_slices])


# %%
def show(k, found=found, case=case):
    """One axial slice: flair, what it would be without a lesion, the anomaly map, the mask and the ground truth."""
    healthy = np.zeros(case.volumes.shape[:3]) if found.pseudo_healthy is None else found.pseudo_healthy[..., 0]
    panels = {"flair": case.volumes[..., 0], "pseudo-healthy flair": healthy, "anomaly map": found.anomaly_map,
              "mask (white: ground truth)": found.mask}
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.6))
    for ax, (title, volume) in zip(axes, panels.items(), strict=True):
        ax.imshow(volume[..., k].T, cmap="gray" if "flair" in title else "magma", vmin=0,
                  vmax=max(float(volume.max()), 1e-6))
        ax.set_title(title, fontsize=8)
        ax.axis("off")
    if case.mask[..., k].any():
        axes[3].contour(case.mask[..., k].T, [0.5], colors="white", linewidths=0.8)
    figure.tight_layout()
    plt.show()


most = int(found.slice_index[found.slice_scores.argmax()])
show(most)

# %% [markdown]
# The same with a slider (in a running notebook):

# %%
ipywidgets.interact(show, k=ipywidgets.IntSlider(most, 0, case.volumes.shape[2] - 1, description="slice"),
                    found=ipywidgets.fixed(found), case=ipywidgets.fixed(case))

# %% [markdown]
# ## An array of your own
#
# Any array can be used. Here the four channels are a list of volumes with another order of axes, and with left and
# right exchanged. The affine describes this. The mask has the axes of the array.

# %%
own = [np.ascontiguousarray(case.volumes[::-1, ..., c].transpose(2, 0, 1)) for c in range(4)]
flip = np.eye(4)
flip[0, 0], flip[0, 3] = -1, case.volumes.shape[0] - 1  # x of `case` = n - 1 - x of `own`
order = np.eye(4)[:, [2, 0, 1, 3]]  # (z, x, y) of `own`
affine = case.affine @ flip @ order
other = localizer(own, affine, name=case.name)
print("mask:", other.mask.shape, "the same lesion:",
      np.array_equal(other.mask.transpose(1, 2, 0)[::-1], found.mask))

# %% [markdown]
# ## Two rules for the mask
#
# A rule chooses the threshold of the map on validation slices. With `healthy_fpr`, a fixed share of the healthy
# slices' pixels is above the threshold. `mixture` chooses the threshold with the largest expected Dice. Both use image
# labels alone: lesion in this slice, yes or no. `calibrate` takes slices, their labels, and their patients. The
# patients are needed for the normalisation and the intervals.

# %%
slices, labels, patients, heights = [], [], [], []
for validation in cases[1:]:
    shown = np.flatnonzero(validation.volumes.any(axis=(0, 1, 3)))
    for k in shown[1::2]:
        slices.append(validation.volumes[:, :, k])
        labels.append(int(validation.mask[:, :, k].any()))
        patients.append(validation.name)
        heights.append((k - shown[0]) / (shown[-1] - shown[0]))
print(len(slices), "slices,", sum(labels), "of them with a lesion")

method, masks = localizer.method, {}
for rule in ("healthy_fpr", "mixture"):
    localizer.method = dataclasses.replace(method, rule=rule, healthy_fpr=0.001)
    print(localizer.calibrate(np.array(slices), labels, patients=patients, heights=heights).described())
    masks[rule] = localizer(case.volumes, case.affine, name=case.name)

# %%
figure, axes = plt.subplots(1, 3, figsize=(8, 2.8))
for ax, (title, volume) in zip(axes, [*((rule, masks[rule].mask) for rule in masks),
                                      ("probability", masks["mixture"].probability)], strict=True):
    ax.imshow(volume[..., most].T, cmap="magma", vmin=0, vmax=1)
    if case.mask[..., most].any():
        ax.contour(case.mask[..., most].T, [0.5], colors="white", linewidths=0.8)
    if title in masks:
        mask = masks[title].mask
        title += f", volume Dice {2 * (mask & case.mask).sum() / (mask.sum() + case.mask.sum()):.2f}"
    ax.set_title(title, fontsize=8)
    ax.axis("off")
figure.tight_layout()
plt.show()

# %% [markdown]
# These are metrics of one phantom subject, with a few validation slices. They say nothing about patients.
#
# ## Your own denoiser in the forward process
#
# `forward_process` is the published method as one pure function. It needs two functions of (x, t): one returns the
# output under the null condition, the other returns the outputs under "healthy" and under the null condition. The
# denoiser below is not trained. It assumes that healthy tissue is never brighter than a ceiling.

# %%
process = Process(make_schedule("linear", 1000))
alpha_bar = jnp.asarray(process.schedule.alpha_bar, jnp.float32)


def eps_of(x, t, ceiling):
    """The noise in x_t if the slice without noise is x_t, scaled back and cut off at the ceiling."""
    a = alpha_bar[t][:, None, None, None]
    return (x - jnp.sqrt(a) * jnp.minimum(x / jnp.sqrt(a), ceiling)) / jnp.sqrt(1 - a)


denoisers = Denoisers(lambda x, t: eps_of(x, t, 9.0),
                      lambda x, t: (eps_of(x, t, 0.5), eps_of(x, t, 9.0)))
flair = case.volumes[..., most, :1] / np.percentile(case.volumes[..., 0][case.volumes[..., 0] > 0], 99)
x0 = jnp.asarray(np.clip(2 * flair - 1, -1, 1))[None]  # [1, X, Y, 1] in [-1, 1]
settings = ForwardSettings(steps=20, guidance=1.0, modality=(0,))
noise = step_noise(jax.random.split(jax.random.key(0), 1), x0.shape[1:])
walked = forward_process(process, denoisers, x0, noise, settings)

figure, axes = plt.subplots(1, 3, figsize=(8, 2.6))
for ax, title, image in zip(axes, ("flair", "prediction, healthy", "anomaly map"),
                            (x0[0, ..., 0], walked.healthy[0, ..., 0], walked.map[0, ..., 0]), strict=True):
    ax.imshow(np.asarray(image).T, cmap="magma" if "map" in title else "gray")
    ax.set_title(title, fontsize=8)
    ax.axis("off")
figure.tight_layout()
plt.show()

# %% [markdown]
# For your own network, use `Localizer(denoisers, process, image_size=..., channels=...)`. `numpy_denoisers` of
# `hae_jax.localization.localizer` wraps a network outside JAX, such as a PyTorch module. For folders of NIfTI
# files, use `translate.py` (docs/translation.md).
