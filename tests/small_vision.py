"""Fields that make the published vision nets small, for tests that compute them."""

TRANSFORMER = dict(patch=8, depth=1, width=32, heads=2)
FIELDS = {
    "vit_tiny": TRANSFORMER,
    "deit_small_distilled": TRANSFORMER,
    "dinov2_small": TRANSFORMER | dict(grid=3, registers=2, pool="class_mean"),
    "dinov3_small": TRANSFORMER,
    "siglip_base": TRANSFORMER,
    "convnext_tiny": dict(blocks=(1, 1), widths=(8, 16)),
    "mobilenet_v3_small": dict(depth=2),
    "mobilenet_v3_large": dict(depth=1),
}
SAME = {"vit_small": "vit_tiny", "vit_base": "vit_tiny"}  # but for the width
IMAGES = (4, 16, 24, 3)
