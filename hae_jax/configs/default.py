"""Every field of the configuration: its meaning, its unit, and what None does. Other configs state only differences.

Any field can be given on the command line: `python train.py --config configs/brats_v2c.py --config.seed=1`.
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """The settings of the published BraTS network, for training and translation."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # of all random numbers: initialisation, data order, noise, dropout, sparse patterns
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
    model.out_channels = config_dict.placeholder(int)  # None: in_channels, doubled for a learned variance
    model.model_channels = 128  # base width; embeddings are 4 times as wide
    model.num_res_blocks = 2  # per level
    model.attention_resolutions = (4, 8, 16)  # downsampling rates: 32, 16 and 8 px of 128
    model.dropout = 0.1
    model.channel_mult = config_dict.placeholder(tuple)  # widths, in model_channels; None: by image_size
    model.conv_resample = True  # learned convolutions in down- and upsampling
    model.num_classes = config_dict.placeholder(int)  # None: unconditional
    model.num_classes = 2  # healthy, lesion
    model.num_heads = 4
    model.num_head_channels = -1  # -1: num_heads decides
    model.num_heads_upsample = -1  # -1: num_heads
    model.use_scale_shift_norm = True  # the embedding scales and shifts the second norm; False: it is added
    model.resblock_updown = False  # resampling by ResBlocks
    model.use_hae = True  # hybrid CNN and transformer blocks; False: a plain U-Net
    model.bottleneck_ratio = 0.25  # hidden width of the bottleneck MLP as a share of its channels
    model.memory_optimization = True  # hae_v2c: skip the class context if it is zero for the whole batch
    model.zero_threshold = 1e-6  # a class embedding counts as zero if no entry exceeds this
    model.null_context = "batch"  # when null rows see a context: batch (as published), sample, keep
    model.sparse_pattern = "blocks"  # blocks (this project's), trained (the published one) or dense
    model.sparse_seed = 0  # seed of the sparse pattern
    model.sparse_redraw = False  # draw the sparse pattern anew at each training step
    model.remat = "none"  # what the backward pass recomputes to save memory: none, block or full
    model.dtype = "float32"  # type of computation: float32 or bfloat16; parameters are always float32
    # How attention and convolution are computed (`hae_jax.ops.forms`). A run may be resumed or used with other forms.
    model.attention = "auto"  # auto (docs/performance.md), xla, or cudnn (FlashAttention on GPUs in bfloat16)
    model.convolution = "auto"  # auto (winograd on CPUs, xla elsewhere), xla or winograd
    return model


def _diffusion() -> ml_collections.ConfigDict:
    """The diffusion process."""
    diffusion = ml_collections.ConfigDict()
    diffusion.schedule = "linear"  # linear, cosine, or single: one step, for a denoising autoencoder (configs/dae.py)
    diffusion.steps = 1000  # number of steps T
    diffusion.predicts = "eps"  # output of the network: eps or x0
    diffusion.variance = "fixed_large"  # fixed_large, fixed_small or learned_range (doubles the output channels)
    diffusion.noise = "gaussian"  # gaussian, simplex (AnoDDPM), or coarse (denoising autoencoder)
    # Clipping of the predicted x0 in sample grids: static ([-1, 1]), dynamic (0.99-quantile) or none.
    diffusion.clipping = "static"
    return diffusion


def _data() -> ml_collections.ConfigDict:
    """Where the slices come from."""
    data = ml_collections.ConfigDict()
    data.root = "data/brats"  # the prepared dataset, made by tools/prepare_data.py
    data.modalities = ("flair", "t1", "t1ce", "t2")  # the channels and their order; as many as model.in_channels
    # How slices are scaled to [-1, 1]: slice (as published: each slice by its own range) or volume (all slices of a
    # case alike; a bright lesion then does not darken the rest of its slice).
    data.scaling = "slice"
    data.balance = False  # draw healthy and lesion slices equally often
    data.healthy_only = False  # train on healthy slices only
    data.workers = 0  # processes that read slices; 0: threads in the training process
    data.prefetch = 4  # batches that are read in advance
    data.phantom = config_dict.placeholder(ml_collections.ConfigDict)  # None: data.root must exist (see phantom.py)
    return data


def _training() -> ml_collections.ConfigDict:
    """Optimisation, logging, saving."""
    training = ml_collections.ConfigDict()
    # Initial parameters and EMA weights: a folder of exported weights, or a shipped name; None: random.
    training.initial_weights = config_dict.placeholder(str)
    training.steps = 210_000
    training.batch_size = 28  # global, over all devices
    training.accumulation = 1  # parts of a batch, processed one after the other; must divide batch_size
    training.learning_rate = 1e-4  # of AdamW
    training.weight_decay = 0.0  # of AdamW
    training.warmup_steps = 0  # linear warm-up from 0
    training.anneal = "none"  # of the learning rate, to 0 at training.steps: none, linear or cosine
    training.clip_norm = config_dict.placeholder(float)  # largest norm of the gradient; None: no clipping
    training.ema_rates = (0.9999,)  # rates of the EMA weights; the first is used for validation and translation
    training.p_uncond = 0.1  # share of labels that are dropped
    training.timesteps = "uniform"  # uniform, or loss-second-moment: more often if the loss is large
    training.nonfinite = "stop"  # if a loss or gradient is not finite: stop, or skip (the step is counted)
    # Devices along ("data", "model"); -1: all remaining devices. Batches are cut over both axes; parameters, EMA
    # weights and optimiser over "model". (-1, 1): data parallel, (1, -1): FSDP, (4, 2): both.
    training.mesh = (-1, 1)
    training.log_every = 100  # steps
    training.save_every = 5_000  # steps; the last step is always saved
    training.keep = 3  # number of checkpoints that are kept, the newest ones
    training.validate_every = 1_000  # steps; 0: no validation loss
    training.validation_slices = 64  # slices of the validation split; always the same
    # Localization metrics on validation slices (method residual, image labels), every so many steps; 0: never. Networks
    # without classes have none. The EMA weights with the best expected Dice times slice AUC are kept in best/.
    training.localization_every = 5_000
    training.localization_slices = 512  # slices of the validation split, evenly spread
    training.sample_every = 5_000  # steps; 0: no sample grids
    training.sample_steps = 50  # DDIM steps of the sample grids
    training.sample_guidance = (0.0, 1.0, 2.0, 4.0)  # guidance strengths w, shown side by side
    training.wandb = config_dict.placeholder(str)  # also log to this wandb project; None: no
    return training


def _translation() -> ml_collections.ConfigDict:
    """How lesions are found and how masks are made (docs/translation.md)."""
    translation = ml_collections.ConfigDict()
    # residual (this project's), hae (published), ddib, anoddpm-simplex, anoddpm-gaussian, classifier, dae, or threshold
    # (intensity threshold)
    translation.method = "residual"
    # How the threshold is chosen on validation slices. From image labels: mixture, healthy_fpr, quantile (published).
    # From ground truth: dice. None: healthy_fpr for residual, quantile for hae, dice for the others.
    translation.rule = config_dict.placeholder(str)
    translation.healthy_fpr = 5e-4  # rule healthy_fpr: share of the healthy slices' head pixels above the threshold
    # residual: timesteps of low noise. Which timesteps are low depends on the resolution; these suit 64 px.
    translation.timesteps = (50, 100, 150, 200, 250, 300)
    translation.draws = 1  # residual: noise draws per timestep; above 1, their spread gives an uncertainty
    # residual: number of rounds. Before each further round, found lesions are replaced by their pseudo-healthy values.
    # Two rounds find more of large lesions. With half as many timesteps they need the same number of passes.
    translation.rounds = 1
    # residual: weight of each channel in the map, positive if lesions are bright in it, negative if they are dark.
    # None: flair 1, t1 -0.5, t1ce 0, t2 0.5.
    translation.weights = config_dict.placeholder(tuple)
    translation.rectify = "after"  # residual: positive part after the mean over timesteps; ablations: before, never
    translation.smoothing = 0.7  # residual: standard deviation of the Gaussian on the map, pixels; 0: none
    translation.forward_steps = 600  # hae: number of forward steps, counted in steps of diffusion.steps
    # "": every step; "100": the whole schedule respaced to 100 steps. Not for residual, dae and threshold.
    translation.respacing = ""
    translation.guidance = 2.0  # guidance strength w
    translation.reference = "healthy"  # hae: reference of the guided prediction: healthy (published), null (paper)
    translation.inversion = "published"  # hae: published (off by one level) or exact (for few steps)
    translation.d_reverse = True  # hae: walk by DDIM inversion; False: new noise at each step
    translation.modality = (0, 3)  # channels of the map, here flair and t2; not for residual and threshold
    translation.clipping = "static"  # of the predicted x0 in translation: static, dynamic or none
    translation.maps = "mse"  # hae: mse; ablations: gradient (rescaled by its weight at t), gradient_unscaled
    translation.t_e_ratio = 1.0  # hae, ablation: end of the average, relative to the step with the largest diff
    translation.last_step_only = False  # hae, ablation: use only that step instead of the average up to it
    translation.every = 1  # hae, ablation: average every k-th step
    translation.ddib_steps = 600  # ddib: number of inversion steps, counted in steps of diffusion.steps
    translation.ddib_start = "published"  # ddib: where denoising starts: published (one step below) or level
    translation.anoddpm_steps = 250  # anoddpm: number of noising steps, counted in steps of diffusion.steps
    translation.classifier_steps = 500  # classifier: number of inversion steps, counted in steps of diffusion.steps
    translation.classifier_scale = 100.0  # classifier: strength of its gradient
    translation.calibration = config_dict.placeholder(str)  # a file or a preset; None: made on validation slices
    translation.batch_size = 32  # slices per batch, over all devices
    translation.max_memory_gb = config_dict.placeholder(float)  # largest batch for this memory; None: batch_size
    translation.filters = config_dict.placeholder(str)  # mm or pixels (published); None: mm for residual, else pixels
    translation.across_mm = 2.0  # mm: standard deviation of the Gaussian across slices of the map; 0: none
    translation.head_erosion_mm = 0.0  # mm: this margin inside the head's outline is left out; 0: none
    translation.median_mm = 0.0  # mm: edge of the cube of a majority filter on the mask; 0: none
    translation.smallest_ml = 0.1  # mm: connected components below this volume are removed; 0: none
    translation.median = True  # pixels: 5 x 5 median filter on the maps
    translation.components = 40  # pixels: connected components of at most this many pixels are removed; 0: none
    translation.filter_dimensions = 2  # pixels: 2 (each slice alone) or 3 (the stack of slices, 5 x 5 x 5)
    translation.save_healthy = False  # write the pseudo-healthy reconstructions as NIfTI
    # Write the probability of a lesion as NIfTI, in [0, 1]; with draws above 1 also its uncertainty, in [0, 0.5].
    translation.save_probability = False
    translation.ema = True  # use the EMA weights; False: the parameters
    return translation


def _evaluation() -> ml_collections.ConfigDict:
    """Pictures and the report page."""
    evaluation = ml_collections.ConfigDict()
    evaluation.overlay_slices = 4  # most anomalous slices in each case's picture; 0: no pictures
    evaluation.report = True  # write report.html at the end
    return evaluation
