"""Reading what llama-server says of its buffers."""

from magi_agent.memory.need import Basis, MemoryNeed, Split
from magi_agent.memory.reported import read_report, refined

MIB = 1 << 20
LOAD = """\
0.00.006.145 I srv    load_model: loading model '/models/some.gguf'
0.00.209.319 I load_tensors: loading model tensors, this can take a while... (load_mode = mmap)
0.00.216.704 I load_tensors:   CPU_Mapped model buffer size =   235.16 MiB
0.00.216.704 I load_tensors:        CUDA0 model buffer size =  1000.00 MiB
0.00.216.704 I load_tensors:        CUDA1 model buffer size =   500.50 MiB
0.00.217.859 I llama_context:  CUDA_Host  output buffer size =     0.75 MiB
0.00.217.927 I llama_kv_cache:      CUDA0 KV buffer size =    90.00 MiB
0.00.217.927 I llama_kv_cache:        CPU KV buffer size =    10.00 MiB
0.00.290.378 I llama_kv_cache: size =   90.00 MiB (  4096 cells,  30 layers), K (f16):   45.00 MiB
0.00.217.927 I llama_memory_recurrent:      CUDA0 RS buffer size =     6.00 MiB
0.00.292.958 I sched_reserve:      CUDA0 compute buffer size =    17.50 MiB
0.00.292.958 I sched_reserve:  CUDA_Host compute buffer size =     2.50 MiB
""".splitlines()


def test_buffers_are_read_by_kind_and_place():
    report = read_report(LOAD)
    assert report is not None
    assert report.weights == Split(round(235.16 * MIB), round(1500.5 * MIB))
    assert report.mapped == round(235.16 * MIB)
    assert report.output == Split(round(0.75 * MIB), 0)
    assert report.kv_cache == Split(10 * MIB, 90 * MIB)
    assert report.recurrent_state == Split(0, 6 * MIB)
    assert report.compute == Split(round(2.5 * MIB), round(17.5 * MIB))


def test_of_several_loads_the_last_one_counts():
    assert read_report([*LOAD, *LOAD]) == read_report(LOAD)


def test_buffers_of_a_draft_model_are_added():
    draft = LOAD[1:]
    report, alone = read_report([*LOAD, *draft]), read_report(LOAD)
    assert report is not None
    assert alone is not None
    assert report.kv_cache.gpu == 2 * alone.kv_cache.gpu
    assert report.mapped == 2 * alone.mapped


def test_lines_that_do_not_tell_are_no_report():
    assert read_report([]) is None
    assert read_report(LOAD[:3]) is None
    assert read_report(["x model buffer size = 1" + "0" * 5000 + ".00 MiB", "compute buffer size ="]) is None


def test_what_was_reported_takes_the_place_of_what_was_estimated():
    report = read_report(LOAD)
    assert report is not None
    need = refined(MemoryNeed(weights=Split(1, 1), other=Split(5, 7), draft=Split(9, 9), slots=4), report)
    assert need.basis is Basis.REPORTED
    assert need.weights == report.weights
    assert need.other == Split(5, 7)
    assert need.draft == Split()
    assert need.slots == 4
