"""Run by test_plugins.py in a process of its own, in which `import tensorrt` is the bindings over stub libraries."""

import json
import sys

import tensorrt as trt
import tensorrt.plugin as trtp

from export import plugins


def described(*shape, dtype=trt.float32):
    desc = trtp.TensorDesc()
    desc.dtype = dtype
    desc.shape_expr = trtp.ShapeExprs(len(shape), _is_dummy=True)
    return desc


plugins.register(trt, "sm90", lazily=True)
registry = sys.modules["tensorrt_bindings.plugin._lib"].QDP_REGISTRY
nms, merge, roi_align = (registry[f"limner::{name}"] for name in ("NmsGroups", "NmsMerge", "PyramidRoiAlign"))
map_align, map_pool = (registry[f"limner::{name}"] for name in ("MapRoiAlign", "MapRoiPool"))
short_align = registry["limner::ShortPyramidRoiAlign"]
boxes, scores = described(1, 1, 1, 1), described(1, 1, 1)
levels = [described(1, 1, 1, 1, dtype=trt.float16) for _ in range(4)]
outputs = nms.register_func(boxes, scores, 0.5, 0.05, 1000, 100)
merged = merge.register_func(*outputs, 0.5, 0.05, 1000, 100)
pooled = roi_align.register_func(*levels, described(1, 1), 7, 2, 0, 224, 4, 256)
short = short_align.register_func(*levels[:3], described(1, 1), 7, 2, 0, 224, 4, 64)
on_map = map_align.register_func(levels[0], described(1, 1), 14, 2, 0, 224, 16, 1024)
on_map += map_pool.register_func(levels[0], described(1, 1), 7, 224, 16, 512)


def launched(built):
    kernel, ptx, params, extras = built
    assert isinstance(params, trtp.KernelLaunchParams)
    code = ptx.decode()
    assert ".target sm_90" in code
    pointers = code.partition(f".entry {kernel}(")[2].partition(")")[0].count(".u64")
    numbers = code.partition(f".entry {kernel}(")[2].partition(")")[0].count(".u32")
    return [kernel, pointers, numbers, len(extras)]


built = [
    launched(nms.aot_impl_func(boxes, scores, 0.5, 0.05, 1000, 100, outputs, 0)),
    launched(merge.aot_impl_func(*outputs, 0.5, 0.05, 1000, 100, merged, 0)),
    launched(roi_align.aot_impl_func(*levels, described(1, 1), 7, 2, 0, 224, 4, 256, pooled, 0)),
    launched(short_align.aot_impl_func(*levels[:3], described(1, 1), 7, 2, 0, 224, 4, 64, short, 0)),
    launched(map_align.aot_impl_func(levels[0], described(1, 1), 14, 2, 0, 224, 16, 1024, on_map[:1], 0)),
    launched(map_pool.aot_impl_func(levels[0], described(1, 1), 7, 224, 16, 512, on_map[1:], 0)),
]


def combinations(found):
    return [[kind.name for kind in each.types] for entry in found for each in entry._get_combinations()]


print(
    json.dumps(
        {
            "attributes": {key: list(value.input_attrs) for key, value in registry.items()},
            "nms": [[out.dtype.name, len(out.shape_expr)] for out in outputs],
            "roi_align": [[out.dtype.name, len(out.shape_expr)] for out in pooled],
            "short": [[out.dtype.name, len(out.shape_expr)] for out in short],
            "on_map": [[out.dtype.name, len(out.shape_expr)] for out in on_map],
            "merged": [[out.dtype.name, len(out.shape_expr)] for out in merged],
            "nms_types": combinations(nms.autotune_func(boxes, scores, outputs)),
            "roi_align_types": combinations(roi_align.autotune_func(*levels, described(1, 1), pooled)),
            "short_types": combinations(short_align.autotune_func(*levels[:3], described(1, 1), short)),
            "map_types": combinations(map_align.autotune_func(levels[0], described(1, 1), on_map[:1])),
            "pool_types": combinations(map_pool.autotune_func(levels[0], described(1, 1), on_map[1:])),
            "built": built,
            "has": [
                hasattr(trt.NetworkDefinitionCreationFlag, "PREFER_AOT_PYTHON_PLUGINS"),
                hasattr(trt.BuilderFlag, "TF32"),
                hasattr(trt.ExecutionContextAllocationStrategy, "USER_MANAGED"),
                hasattr(trt.MemoryPoolType, "WORKSPACE"),
                hasattr(trt.DataType.HALF, "name"),
                hasattr(trt.TensorIOMode, "INPUT"),
                hasattr(trt.ICudaEngine, "get_device_memory_size_for_profile_v2"),
                hasattr(trt.IExecutionContext, "set_device_memory"),
                hasattr(trt.IExecutionContext, "set_optimization_profile_async"),
                hasattr(trt.IExecutionContext, "infer_shapes"),
                hasattr(trt.IExecutionContext, "execute_async_v3"),
                hasattr(trt.IBuilderConfig, "progress_monitor"),
                hasattr(trt.IBuilderConfig, "builder_optimization_level"),
                hasattr(trt.IBuilderConfig, "create_timing_cache"),
                hasattr(trt.IBuilderConfig, "get_timing_cache"),
                hasattr(trt.IBuilderConfig, "clear_flag"),
                hasattr(trt.ITimingCache, "serialize"),
                hasattr(trt.IOptimizationProfile, "set_shape"),
                hasattr(trt.Runtime, "deserialize_cuda_engine"),
                hasattr(trt.ILogger, "INTERNAL_ERROR"),
            ],
        }
    )
)
