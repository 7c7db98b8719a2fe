"""Every field of the configuration: its meaning, its unit, and what None does. The other configs state differences.

Any field can be given on the command line: `python train.py --config configs/brats_v2c.py --config.seed=1`.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """The settings that the published BraTS network was trained and translated with."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # of everything random: initialisation, data order, noise, dropout, sparse patterns
    config.model = _model()
    config.diffusion = _diffusion()
    config.data = _data()
    config.training = _training()
    config.translation = _translation()
    config.evaluation = _evaluation()
    return config.lock()


def _model() -> ml_collections.ConfigDict:
    """The network; each field is explained in `hae_jax.model.UNetConfig`."""
    model = ml_collections.ConfigDict()
    model.task = "denoise"  # or classify: a classifier of noised slices (configs/classifier.py)
    model.variant = "hae_v2c"  # fpdm, hae, hae_lite, hae_v2 or hae_v2c
    model.image_size = 128  # pixels
    model.in_channels = 4  # flair, t1, t1ce, t2
    model.out_channels = config_dict.placeholder(int)  # None: as in_channels, doubled for a learned variance
    model.model_channels = 128
    model.num_res_blocks = 2  # per level
    model.attention_resolutions = (4, 8, 16)  # downsampling rates: 32, 16 and 8 px of 128
    model.dropout = 0.1
    model.channel_mult = config_dict.placeholder(tuple)  # width of each level; None: the usual one for image_size
    model.conv_resample = True
    model.num_classes = config_dict.placeholder(int)  # None: unconditional
    model.num_classes = 2  # healthy, lesion
    model.num_heads = 4
    model.num_head_channels = -1  # -1: by num_heads
    model.num_heads_upsample = -1  # -1: as num_heads
    model.use_scale_shift_norm = True
    model.resblock_updown = False
    model.use_hae = True
    model.bottleneck_ratio = 0.25
    model.memory_optimization = True
    model.zero_threshold = 1e-6
    model.null_context = "batch"  # batch (as published), sample or keep: whether a null row sees a context
    model.sparse_pattern = "blocks"  # blocks (ours), trained (the published one) or dense
    model.sparse_seed = 0
    model.sparse_redraw = False  # draw the sparse pattern anew at each training step
    model.remat = "none"  # none, block or full: what the backward pass recomputes to save memory
    model.dtype = "float32"  # of computation: float32 or bfloat16; parameters are float32
    # The code that computes; not a part of the network, so a run may go on, or its network be used, with another.
    # auto: rows on CPUs, xla elsewhere; cudnn: FlashAttention on GPUs in bfloat16 (`hae_jax.ops.forms`).
    model.attention = "auto"  # auto, xla or cudnn
    model.convolution = "auto"  # auto (winograd on CPUs, xla elsewhere), xla or winograd
    return model


def _diffusion() -> ml_collections.ConfigDict:
    """The diffusion process."""
    diffusion = ml_collections.ConfigDict()
    diffusion.schedule = "linear"  # linear or cosine; single: one step, of a denoising autoencoder (configs/dae.py)
    diffusion.steps = 1000  # T
    diffusion.predicts = "eps"  # eps or x0: what the network gives
    diffusion.variance = "fixed_large"  # fixed_large, fixed_small or learned_range (doubles the output channels)
    diffusion.noise = "gaussian"  # gaussian, simplex as in AnoDDPM, or coarse as in the denoising autoencoder
    diffusion.clipping = "static"  # of predicted x0: static ([-1, 1]), dynamic or none
    return diffusion


def _data() -> ml_collections.ConfigDict:
    """Where the slices come from."""
    data = ml_collections.ConfigDict()
    data.root = "data/brats"  # the prepared dataset, made by tools/prepare_data.py
    data.modalities = ("flair", "t1", "t1ce", "t2")  # the channels in their order; as many as model.in_channels
    # Of slices, to the network's [-1, 1]: slice (as published, each by its own range) or volume (all slices of a case
    # alike, so that a bright lesion does not darken the rest of its slice).
    data.scaling = "slice"
    data.balance = False  # draw healthy and lesion slices equally often
    data.healthy_only = False  # train on healthy slices alone
    data.workers = 0  # processes that read slices; 0: threads of the training process
    data.prefetch = 4  # batches read ahead
    data.phantom = config_dict.placeholder(ml_collections.ConfigDict)  # None: data.root must exist (see phantom.py)
    return data


def _training() -> ml_collections.ConfigDict:
    """Optimisation, logging, saving."""
    training = ml_collections.ConfigDict()
    # Where the parameters and their EMA begin: a folder of exported weights or a shipped name; None: random.
    training.initial_weights = config_dict.placeholder(str)
    training.steps = 210_000
    training.batch_size = 28  # global, over all devices
    training.accumulation = 1  # parts that a batch is cut into, one after the other; must divide batch_size
    training.learning_rate = 1e-4  # of AdamW
    training.weight_decay = 0.0
    training.warmup_steps = 0  # linear, from 0
    training.anneal = "none"  # none, linear or cosine: to 0 at training.steps
    training.clip_norm = config_dict.placeholder(float)  # of the gradient; None: no clipping
    training.ema_rates = (0.9999,)  # exponential moving averages of the parameters; the first is used
    training.p_uncond = 0.1  # share of labels that are dropped
    training.timesteps = "uniform"  # uniform, or loss-second-moment: more often where the loss is large
    training.nonfinite = "stop"  # when a loss or gradient is not finite: stop, or skip the step and count it
    # Devices along ("data", "model"), -1: what is left. Batches are cut over both; parameters, EMA weights and
    # optimiser over "model": (-1, 1) is data parallel, (1, -1) FSDP, (4, 2) both.
    training.mesh = (-1, 1)
    training.log_every = 100  # steps
    training.save_every = 5_000  # steps; the last step is always saved
    training.keep = 3  # newest checkpoints that are kept
    training.validate_every = 1_000  # steps; 0: no validation loss
    training.validation_slices = 64  # of the validation split; the same ones each time
    # How well lesions are found on validation slices (method residual, image labels): steps; 0, or a network without
    # classes: not. The EMA weights with the best expected Dice times AUC of slices are kept in best/.
    training.localization_every = 5_000
    training.localization_slices = 512  # of the validation split, evenly spread
    training.sample_every = 5_000  # steps; 0: no sample grids
    training.sample_steps = 50  # DDIM steps of the sample grids
    training.sample_guidance = (0.0, 1.0, 2.0, 4.0)  # strengths w shown side by side
    training.wandb = config_dict.placeholder(str)  # project to log to with wandb as well; None: no
    return training


def _translation() -> ml_collections.ConfigDict:
    """How lesions are found, and the masks (see `hae_jax.localization`)."""
    translation = ml_collections.ConfigDict()
    # residual (ours), hae (published), ddib, anoddpm-simplex, anoddpm-gaussian, classifier, dae, or threshold (of
    # intensity)
    translation.method = "residual"
    # How the threshold is chosen on validation slices: mixture, healthy_fpr, quantile (published), which see image
    # labels, or dice, which sees ground truth. None: residual healthy_fpr, hae quantile, baselines dice.
    translation.rule = config_dict.placeholder(str)
    translation.healthy_fpr = 5e-4  # share of the healthy slices' head pixels above the threshold; rule healthy_fpr
    # Of residual. Low noise finds lesions; which timesteps are low depends on the resolution (these suit 64 px).
    translation.timesteps = (50, 100, 150, 200, 250, 300)
    translation.draws = 1  # noise draws for each timestep; with more, the map's spread is an uncertainty
    # How often a slice is looked at; before each further time, what was found is filled in with its pseudo-healthy
    # values. 2 finds more of large lesions, with the same passes if there are half as many timesteps.
    translation.rounds = 1
    # One number for each channel: its weight in the map, above 0 where lesions are bright, below where they are dark.
    # None: flair 1, t1 -0.5, t1ce 0, t2 0.5.
    translation.weights = config_dict.placeholder(tuple)
    translation.rectify = "after"  # positive part after the mean over timesteps; ablations: before, never (absolute)
    translation.smoothing = 0.7  # standard deviation of the Gaussian on the map, pixels; 0: none
    translation.forward_steps = 600  # of diffusion.steps; with respacing, those retained among the first 600
    translation.respacing = ""  # "" walks every step; "100" walks a tenth of 1000
    translation.guidance = 2.0  # w
    translation.reference = "healthy"  # healthy (as published) or null (as in the paper)
    translation.inversion = "published"  # of hae's walk: published (one level off) or exact, for few steps
    translation.d_reverse = True  # walk by DDIM inversion; False: fresh noise at each step
    translation.modality = (0, 3)  # channels that the maps are made of: flair and t2
    translation.clipping = "static"  # of predicted x0: static, dynamic or none
    translation.maps = "mse"  # mse, or as ablations gradient (rescaled by its weight at t) or gradient_unscaled
    translation.t_e_ratio = 1.0  # ablation: the end of the averaging, as a share of the step where diff peaks
    translation.last_step_only = False  # ablation: that step alone instead of the average up to it
    translation.every = 1  # ablation: average every k-th step
    translation.ddib_steps = 600  # of diffusion.steps: how far DDIB goes
    translation.ddib_start = "published"  # of DDIB's way back: published (one step below), or level (where it got)
    translation.anoddpm_steps = 250  # of diffusion.steps: how far AnoDDPM goes
    translation.classifier_steps = 500  # of diffusion.steps: how far classifier guidance goes
    translation.classifier_scale = 100.0  # strength of the classifier's gradient
    translation.calibration = config_dict.placeholder(str)  # None: made on validation data; a file or a preset's name
    translation.batch_size = 32  # slices at once, over all devices
    translation.max_memory_gb = config_dict.placeholder(float)  # choose the batch size by memory; None: batch_size
    translation.filters = config_dict.placeholder(str)  # mm or pixels (published); None: residual mm, others pixels
    translation.across_mm = 2.0  # mm: standard deviation of a Gaussian across the slices of a map; 0: none
    translation.head_erosion_mm = 0.0  # mm: lesions are looked for at least so deep below the head's outline
    translation.median_mm = 0.0  # mm: edge of the cube whose majority decides on a voxel of the mask; 0: off
    translation.smallest_ml = 0.1  # mm: connected components below this volume are removed; 0: none
    translation.median = True  # pixels: 5 x 5 median filter on the maps
    translation.components = 40  # pixels: connected components of at most so many pixels are removed; 0: none
    translation.filter_dimensions = 2  # pixels: 2, each slice alone; 3, over the stack of slices (5 x 5 x 5)
    translation.save_healthy = False  # write the pseudo-healthy reconstructions as NIfTI
    # Write the probability of a lesion as NIfTI; with draws above 1 also its uncertainty. Both in [0, 1].
    translation.save_probability = False
    translation.ema = True  # use the EMA weights
    return translation


def _evaluation() -> ml_collections.ConfigDict:
    """What is shown."""
    evaluation = ml_collections.ConfigDict()
    evaluation.overlay_slices = 4  # most anomalous slices in each case's picture; 0: no pictures
    evaluation.report = True  # write report.html at the end
    return evaluation
