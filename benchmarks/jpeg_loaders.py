"""One loader in a process of its own, for `jpegs.py`: a round of batches for each line of stdin.

It runs in the Python that has the loader's library, so it imports nothing of the others.
"""

import functools
import json
import os
import pathlib
import sys
import time
import warnings

SIZE, BATCH, BATCHES, WARM = 224, 64, 4, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ours(name, end, folder):
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    from qkd_jax import data

    decoder = name.partition(", ")[2]
    dataset = data.load("folder", data_dir=folder, decoder=decoder)
    augment = ("random_resized_crop", "flip")
    batches = data.train_batches(dataset, batch_size=BATCH, seed=0, augment=augment)
    return batches.iter(prefetch=1, pixels=end == "8 bit"), versions(
        "numpy", "pillow", *FAST[decoder]
    )


FAST = {"pillow": (), "turbo": ("simplejpeg", "opencv-python-headless")}


def tf_data(name, end, folder):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf  # pyrefly: ignore[missing-import]  # optional peer

    mean, std = (255 * tf.constant(values) for values in (MEAN, STD))
    files = sorted(map(str, pathlib.Path(folder, "train").glob("*/*.jpg")))
    # What our fast decoder asks of libjpeg-turbo too.
    fast = dict(dct_method="INTEGER_FAST", fancy_upscaling=False) if name.endswith("fast") else {}

    def load(path):
        encoded = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(encoded),
            bounding_boxes=tf.zeros([0, 0, 4], tf.float32),
            area_range=(0.08, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        box = tf.concat([begin[:2], size[:2]], axis=0)
        image = tf.io.decode_and_crop_jpeg(encoded, box, channels=3, **fast)
        image = tf.image.random_flip_left_right(tf.image.resize(image, (SIZE, SIZE)))
        return (image - mean) / std if end == "float" else image

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    data = tf.data.Dataset.from_tensor_slices(files).repeat().shuffle(len(files))
    data = data.map(load, num_parallel_calls=1).batch(BATCH).prefetch(1).with_options(options)
    return data.as_numpy_iterator(), versions("tensorflow_cpu", "tensorflow")


def torchvision(name, end, folder):
    import torch  # pyrefly: ignore[missing-import]  # optional peer
    from torchvision import datasets, io, transforms  # pyrefly: ignore[missing-import]
    from torchvision.transforms import v2  # pyrefly: ignore[missing-import]

    torch.set_num_threads(1)
    root = str(pathlib.Path(folder, "train"))
    if name.endswith("Pillow"):
        chain = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
        if end == "float":
            chain += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        else:
            chain += [transforms.PILToTensor()]
        data = datasets.ImageFolder(root, transforms.Compose(chain))
    else:
        chain = [v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()]
        if end == "float":
            chain += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]

        def load(path):
            return io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB)

        data = datasets.ImageFolder(root, v2.Compose(chain), loader=load)
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=0)

    def endless():
        while True:
            yield from loader

    return endless(), versions("torch", "torchvision", "pillow")


def versions(*names):
    import importlib.metadata

    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def stages(name, folder):
    """Seconds an image of each part of our loader."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    import numpy as np

    from qkd_jax import data
    from qkd_jax.data import crops, decoding, draws, streams

    decoder = name.partition(", ")[2]
    dataset = data.load("folder", data_dir=folder, decoder=decoder)
    images = dataset.train_images
    assert isinstance(images, streams.StreamedImages)
    encoded = images.encoded
    count = 64
    raw = draws.words(count * crops.WORDS, seed=0, stream=9).reshape(count, -1)
    out = np.empty((count, SIZE, SIZE, 3), np.uint8)
    contents = [encoded.read(row) for row in range(count)]

    def decoded(choose):
        for number, (content, words, image) in enumerate(zip(contents, raw, out, strict=True)):
            box = functools.partial(choose, words)
            decoding.decode(decoder, content, box, image, mirrored=number % 2 == 0)

    def last_pixel(words, height, width):
        top, left, h, w = crops.random_box(words, height, width)
        return top + h - 1, left + w - 1, 1, 1

    # The last pixel of a box costs no resizing: what is left is the decoding.
    parts = {
        "read the file": lambda: [encoded.read(row) for row in range(count)],
        "draw the box": lambda: [crops.random_box(words, 375, 500) for words in raw],
        "decode the JPEG": lambda: decoded(last_pixel),
        "with crop, resize, flip": lambda: decoded(crops.random_box),
        "normalise": lambda: dataset.normalize(out),
    }
    found = {}
    for part, run in parts.items():
        times = []
        for _ in range(5):
            begin = time.process_time()
            run()
            times.append(time.process_time() - begin)
        found[part] = min(times) / count
    both = found.pop("with crop, resize, flip")
    found["crop, resize, flip"] = max(both - found["decode the JPEG"], 0.0)
    found["decode the JPEG"] -= found["draw the box"]
    return found


def main():
    name, end, folder, core = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    warnings.simplefilter("ignore")
    if end == "stages":
        print(json.dumps(stages(name, folder)))
        return
    make = {"o": ours, "t": tf_data if name.startswith("tf") else torchvision}[name[0]]
    batches, used = make(name, end, folder)
    next(batches)
    print(used, flush=True)
    for _ in sys.stdin:
        for _ in range(WARM):
            next(batches)
        # Of the processor, all threads together: on the wall others' work counts too.
        begin = time.process_time()
        for _ in range(BATCHES):
            next(batches)
        print(BATCH * BATCHES / (time.process_time() - begin), flush=True)


if __name__ == "__main__":
    main()
