"""What ``--help`` says below the options of a command: examples, files written, exit status."""

from __future__ import annotations

TRAJECTORIES = """\
camera paths (--trajectory):
  smooth                     twice differentiable path through all photos (default)
  interp                     ViewCrafter's interpolation through all photos
  orbit:deg=20               from a photo around the scene's centre, degrees, positive to the right
  spiral:deg=8,turns=1       a loop around a photo that looks at the scene's centre
  dolly:forward=0.2          along the viewing axis, in fractions of the median depth
  target:phi=10,theta=5,r=0.1,x=0,y=0
                             ViewCrafter's relative target: degrees, fraction of the centre depth, pixels
  nbv:phi=20,theta=10        to the side, to one of up to three targets: the one that the points cover least (next best view)
  txt:FILE                   ViewCrafter's text file with a line each of phi, theta and r values
  cameras:FILE               the cameras of a transforms.json or COLMAP model, in the world of --cameras
  cameras:FILE:FIRST-LAST    only these of them, counted from 0, both included
orbit, spiral, dolly, target and nbv take photo=N, the photo to start from, counted from 0; target and nbv elevation=5, the angle
between the photo's view and the plane of their turns, degrees.
"""

GENERATE = f"""\
examples:
  fvgen generate left.jpg right.jpg --output room
  fvgen generate a.jpg b.jpg c.jpg --frames 16 --seed 3 --output walk     31 frames: neighbours share the photo between them
  fvgen generate a.jpg b.jpg --cameras transforms.json --output known     cameras known, for example from COLMAP
  fvgen generate a.jpg b.jpg --trajectory orbit:deg=15 --output orbit
  fvgen generate a.jpg b.jpg --dust3r-weights dust3r --output learned     geometry by DUSt3R instead of features and stereo
  fvgen generate a.jpg --dust3r-weights dust3r --trajectory orbit:deg=15 --output one
  fvgen generate a.jpg --dust3r-weights dust3r --trajectory nbv:phi=20 --then nbv:phi=20 nbv:phi=20 --output further
  torchrun --nproc-per-node 4 -m fvgen.cli generate *.jpg --clips-at-once 1 --output long     clips spread over four GPUs

{TRAJECTORIES}
written to --output:
  video.mp4, frames/0000.png ...    the generated frames
  render.mp4, renders/0000.png ...  the point-cloud renders they were made from
  contact_sheet.png                 photos, renders and generated frames in one picture
  cameras.json                      camera of every frame (transforms.json format)
  points.ply                        the coloured point cloud
  report.json                       settings, versions, timings, figures about geometry and quality
"""

RENDER = f"""\
examples:
  fvgen render left.jpg right.jpg --output room
  fvgen render a.jpg b.jpg --size 1024x576 --trajectory dolly:forward=0.3 --output dolly
  fvgen render images/0000.jpg images/0015.jpg --cameras transforms.json \\
      --trajectory cameras:transforms.json:0-15 --truth images --output check     compare with the true frames

{TRAJECTORIES}
written to --output: render.mp4, renders/0000.png ..., contact_sheet.png, cameras.json, points.ply, report.json
"""

BENCH = """\
examples:
  fvgen bench kernels --json kernels.json            every operator at its real shapes, beside torch.compile
  fvgen bench kernels --ops geglu group_norm_silu    two of them
  fvgen bench sampler --model viewcrafter_512 --batch 1 2 4
  fvgen bench sampler --runner modules               without the inference engine
  fvgen bench speedup                                4 steps against 50 guided ones: less than 90 % saved is a failure
  fvgen bench train --model viewcrafter_512 --profile profile.md --json one.json
  torchrun --nproc-per-node 4 -m fvgen.cli bench train --model viewcrafter_512 --shard --single one.json --json four.json
  torchrun --nproc-per-node 2 -m fvgen.cli bench views --model viewcrafter_512 --json two.json
  fvgen bench all --quick                            every suite with small shapes, also without a GPU
  fvgen bench all --json new.json --compare old.json
  fvgen bench report new.json --output docs/benchmarks

suites:
  kernels   operators: time, share of the measured copy bandwidth, reference, torch.compile, libraries
  raster    point rasterizer over points, views, points per pixel, image size; image and gradients
  dust3r    the network on two photos, the alignment of eight
  sampler   one clip stage by stage and whole, first clip of a new process, batches, the teacher
  train     a training step of the tiny model; with --model, both stages of the distillation and stage 2 in plain PyTorch
  speedup   guided teacher and four-step student from points to frames in one process
  views     under torchrun: new views between five photos, clips spread over the GPUs, beside one process alone
  all       all of these but views
  report    tables and pictures of result files; give the files right behind the word

exit status: 0 done, 1 a figure worse than with --compare by more than 5 %, or less than 90 %
saved (not judged with --quick), 2 bad input.
Figures count only from an otherwise idle GPU. Its settings are never changed; clocks and throttling are recorded.
"""


PREPARE = """\
examples:
  fvgen prepare captures --output shards                        for the bundled model, into its 16 frames of 160 x 256
  fvgen prepare DL3DV-10K --model models/viewcrafter_512 --clips-per-scene 2 --output shards
  fvgen prepare captures --output shards --part 3/8             the third of eight shares, for example on the third machine
  torchrun --nproc-per-node 8 -m fvgen.cli prepare captures --output shards
  fvgen prepare --output shards --verify                        compare every file with its checksum

FOLDER is searched for captures with known cameras:
  transforms.json               nerfstudio, instant-ngp, DL3DV-10K (images_4, images_8 are found); depth_file_path is used
  images and sparse/0           COLMAP, text or binary, undistorted
  NAME.txt beside a folder NAME RealEstate10K, its frames named by their timestamps

Of each, --clips-per-scene clips are drawn: a stride of 1 to --max-stride and a first frame. The first and last frame give a
point cloud, which is rendered along the cameras of the clip; renders and photos are encoded with the model. The same command goes
on after an interruption with the shards that are missing, and ends with the same bytes.

written to --output:
  clips-00000.safetensors ...   latents, image tokens and cameras of the clips
  constants.safetensors         text tokens and unconditional context
  info.json, index.json         settings, chosen clips and versions; sizes and SHA-256 of all files
  report.md, report.json        how many clips were rejected and why, coverage and PSNR of the others
  contact_sheet.png             photo, renders and truth of a few clips: look at it before you train
"""

DISTILL = """\
examples:
  fvgen distill --recipe tiny --output run                               the whole method on the bundled teacher
  fvgen distill --recipe tiny --output run                               again: goes on from the last checkpoint
  fvgen distill --recipe tiny --iterations 2 --lead 0 --output trial     to see that it runs
  fvgen distill --recipe tiny --method dmd2 --minutes 30 --output dmd2
  fvgen distill --recipe tiny --set r1_weight=0.1 --set head.width=128 --output other
  fvgen distill --recipe viewcrafter_512 --teacher viewcrafter --data shards --dry-run --output run
  torchrun --nproc-per-node 8 -m fvgen.cli distill --recipe viewcrafter_512 --shard --batch 8 \\
      --teacher viewcrafter --data shards --output run

methods:
  fvgen            adversarial initialisation, then distribution matching with softened reverse KL
  stage_one_only   the first of these alone
  no_stage_one     the second alone
  reverse_kl       both, the second with plain reverse KL
  dmd2             matching and adversarial loss together, no stages
  causvid          regression on the teacher's trajectories, then plain distribution matching

written to --output: run.json, checkpoints/, losses.jsonl, progress.jsonl, tensorboard/, validation/
exit status: 0 done or time is up, 2 bad input, 3 a guard stopped the run (stopped.json says why), 130 interrupted
More in docs/training.md.
"""

EXPORT = """\
examples:
  fvgen export-student run --output student
  fvgen export-student run/checkpoints/stage1-004000 --no-ema --output stage1
  fvgen generate left.jpg right.jpg --model student --output room
"""

CONVERT = """\
examples:
  fvgen convert dust3r DUSt3R_ViTLarge_BaseDecoder_512_dpt.pth --output dust3r
  fvgen convert viewcrafter model_sparse.ckpt --variant 1024 --output viewcrafter
  fvgen convert viewcrafter --verify --output viewcrafter     compare with the checksums
  fvgen generate a.jpg b.jpg --dust3r-weights dust3r --model viewcrafter --output room

Pickled files are read as plain tensors; nothing in them is run. Every weight has to be known: what is left out, and why, is said.
The directory appears whole or not at all. More in docs/weights.md.
"""
