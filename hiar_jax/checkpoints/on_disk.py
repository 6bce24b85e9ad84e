"""What lies on disk: every file of a workdir, of a checkpoint and of converted weights.

A name ending in / stands for all files below it. "Atomic" means files.write_atomic: a temporary
name in the same directory, fsync, rename; a process that dies leaves the old file or the new one.
A full disk is files.DiskFull everywhere, a damaged file errors.Damaged.

While `train` is at work in a workdir, or `convert` in its --out, a file .lock there names the
process (checkpoints.lock). It is removed at the end; one that a killed process left locks nothing.

Workdir (--workdir; of several processes one writes, but for checkpoints)

    config.json
      JSON: the config after overrides. config.workdir.save_resolved, at every start. Atomic; no
      checksum. Read by lineage.change (the same command goes on), generate, stream, evaluate and
      convert --export.
    config.<stage>-<step>.json, sample.<stage>-<step>/
      The config, and the samples, until a stage was trained on from that step with another config
      (train --extend). training.lineage; copied and renamed. For people.
    logs/metrics.jsonl
      A JSON object a line. training.log.Writer appends; an incomplete last line is dropped when a
      run goes on. Read by training.log.read_log.
    logs/starts.jsonl
      A JSON object for each start of `train`: time, command, versions, revision of the checkout,
      devices. training.starts.keep; atomic. For people: nothing compares it. Runs from before it
      was written have none.
    logs/samples/<stage>-<step>.png
      Previews. training.log.Writer; atomic. For people.
    logs/events.out.tfevents.<host>
      TensorBoard's format, by tensorboardX; not atomic. For TensorBoard.
    data/recipe.json
      JSON: the settings that the data set was made from. data.tfds_builder.write_recipe; atomic.
      Read by check_recipe: other settings are refused.
    data/<builder>/<config>/<version>/
      The data set: ArrayRecord, which keeps hashes of its chunks, and TFDS's description.
      data.tfds_builder.build; written as incomplete.*, then renamed, and its records are counted.
      Read by tfds_builder.open_source.
    data/codec.npz
      The autoencoder fitted on the data, where it is not Wan's. components.patch_pca.save; atomic;
      CRC-32 of the ZIP format. Read by PatchPCAConfig.open.
    data/words.json
      JSON: the words that a prompt may hold, in the order of their ids.
      components.word_table.WordTableConfig.fit; atomic; no checksum. Read by its open. Runs from
      before it was written read the words from the data.
    origins/
      Copies of codec.npz and words.json, which prompts and latents are read by from then on, and
      weights.json: fingerprints of the published weights that took part. training.origins.Origins,
      after the data stage; atomic. Read by its check: others than these are refused. Runs from
      before have none.
    trajectories/recipe.json
      As data/recipe.json, with the noise levels. Read by data.trajectories.read_sigmas too.
    trajectories/<builder>/<config>/<version>/
      As the data set of data/. While it is made, trajectories/parts/ holds finished parts (.npz,
      atomic), which a stopped run keeps.
    <stage>/checkpoints/<step>/
      A checkpoint, below; stage: teacher, causal_init, distill or framepack. The newest log.keep
      are kept. A damaged one is renamed to <step>.damaged, and the one before it is used.
    sample/<prompt>.mp4
      Videos of the distilled student. video.mp4.write_mp4; atomic. For people.
    sample/contact_sheet.png
      Frames of all of them. video.png.write_png; atomic. For people.
    sample/metrics.json
      JSON: what was measured. training.stages.make_samples; atomic, and the last file of a run: the
      stage is skipped where it exists. Nothing else reads it.

Codebook (of a packed model's workdir, where history is discretised)

    codebook/codebook.npz
      Centroids of the clips' latents. packing.codebook.save; atomic; CRC-32 of the ZIP format. Read
      by CodebookConfig.open.

Checkpoint (of a stage; a saved stream is a directory with one of them)

Written by training_state.Checkpoints through Orbax under <step>.orbax-checkpoint-tmp*, then
renamed: a directory <step> is complete. Its checksums are those of checksums.json.

    <step>/state/
      The training state, or a stream's: arrays in Orbax's OCDBT format, each process writing its
      part. Read by Checkpoints.restore.
    <step>/params/
      The weights for inference (the average of the student's), or a stream's decoder; the same
      format. Read by load_params.
    <step>/data/
      Positions in the data, process_<i>-of-<n>.json, one a process; not of a stream. Read by
      Checkpoints.restore.
    <step>/config/
      JSON: the model's config, or a stream's metadata. Read by load_config, and compared by
      Checkpoints.restore.
    <step>/checksums.json
      JSON: {file of the four above: its CRC-32}; of a checkpoint above checksums.LIMIT bytes their
      sizes alone. checksums.write, before the rename. Read by checksums.check before every read.
    <step>/_CHECKPOINT_METADATA
      Orbax's log of the save; not summed, and nothing here reads it.
    <step>/commit_success.txt
      Orbax's mark on file systems without atomic renames; not summed, and nothing here reads it.

Weights (hiar_jax.convert --out; kind: dit, vae, umt5 or tiny_vae)

    <kind>/model.json
      JSON: config, source, number of tensors, fingerprint, and the folder that holds the numbers
      (weights.Description). weights.save; atomic, and written last. Read by weights.describe.
    <kind>/params/
      Zarr v3 arrays in an Orbax checkpoint, a CRC-32C for each chunk (stored_arrays.write); or in
      params_, which alternates with it: the one that model.json does not name is removed. Read by
      weights.load and weights.open_arrays.
    tokenizer/tokenizer.json
      Hugging Face's format. hiar_jax.convert; atomic. Read by components.umt5_tokenizer.
    texts/<encoder>/<prompt>.safetensors
      Embeddings of prompts, in text.cache or here. components.umt5_encoder.TextCache; atomic; no
      checksum, but safetensors' lengths must agree. Read by TextCache.rows.

tests/checkpoints/test_on_disk.py compares this page with what is really written.
"""

CHECKPOINTS = "checkpoints"  # folder of a stage
CHECKSUMS = "checksums.json"  # file of a checkpoint
LOCK = ".lock"  # file of a folder that a process writes to
DAMAGED = ".damaged"  # added to the name of a checkpoint that is set aside
MODEL = "model.json"  # file of a kind of converted weights
PARAMS = ("params", "params_")  # the two folders that its numbers alternate between
TOKENIZER = "tokenizer/tokenizer.json"  # file of converted weights
