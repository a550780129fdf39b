#!/usr/bin/env bash
# What docs/results.md shows, and the GPU tests, on a host with four GPUs: a queue of jobs a GPU.
#
#     bash tools/measure.sh OUT tests maps          # some of: tests maps runs points turns ranks
#     OLD=../older bash tools/measure.sh OUT turns  # in turn with another checkout
#     bash tools/measure.sh OUT soak "map 8B 36+96" # single jobs, on the GPUs that are visible
#
# OUT/NAME.txt is what a job printed, OUT/NAME.json what a benchmark measured. Steps of few sequences
# are as fast as the host's CPUs let them be, so those run when nothing else does.
set -uo pipefail
out=$(realpath -m "$1"); shift
old=${OLD:+$(realpath "$OLD")}  # `turns` needs it
cd "$(dirname "$0")/.."
mkdir -p "$out"
export TQDM_DISABLE=1 OMP_NUM_THREADS=4

say() { echo "[${SECONDS}s] $*"; }
job() {  # NAME SECONDS COMMAND...
  local name=$1 limit=$2; shift 2
  timeout "$limit" "$@" > "$out/$name.txt" 2>&1
  say "$name: exit code $?: $(grep -v '^{' "$out/$name.txt" | tail -1 | cut -c1-150)"
}
bench() { local name=$1 limit=$2; shift 2; job "$name" "$limit" python bench_pipeline.py "$@" --json "$out/$name.json"; }
older() { (cd "${old:?OLD is not set}" && bench "$@"); }
pytest() { local name=$1 limit=$2; shift 2; job "$name" "$limit" python -m pytest -p no:cacheprovider -v "$@"; }
on() {  # GPUS JOB...: one after the other
  local gpus=$1 each; shift
  (export CUDA_VISIBLE_DEVICES=$gpus; for each in "$@"; do eval "$each"; done) &
}

engine_tests() { pytest engine 300 tests/gpu/test_{engine,green_ctx}.py; }
kernel_tests() { pytest kernels 300 tests/gpu/test_kernels.py; }
pipeline_tests() { pytest pipeline 400 tests/gpu/test_{pipeline,planner,memory}.py; }
soak() { job soak 340 python tests/soak.py --minutes 5 --seed 5 --device cuda; }
memcheck() {
  local only=""; [ "$1" = 1 ] || only="--target-processes application-only"
  job "memcheck-$1" 300 compute-sanitizer --tool memcheck --report-api-errors no $only python tests/gpu/memcheck_steps.py "$1"
}
rank_tests() {
  local way
  for way in "float32 and graphs" "float32 and not graphs" "killed" "not float32 and not killed"; do
    pytest "ranks-${way// /-}" 300 tests/gpu/test_tensor_parallel.py -k "$way" &
  done
  wait
  pytest peers 200 tests/gpu/test_{peer_memory,logprobs}.py
}
tests() {
  on 0 engine_tests soak kernel_tests; on 1 pipeline_tests "memcheck 1"; on 2,3 rank_tests "memcheck 2"
  wait
}

map() { local shape=$1; shift; bench "map-$shape" 500 --map --shapes "$shape" --modes sequential green auto --splits "$@"; }
maps() {
  on 0 "map 8B 36+96 44+88 --seconds 0.9"; on 1 "map 14B 28+104 36+96"; on 2 "map 4B 36+96 52+80"
  on 3 "map 1.7B 36+96 52+80"
  wait
  on 0 "map 0.6B 36+96 52+80"
  wait
}

run() { bench "$2-$3" 300 --workload throughput --shape "$1" --requests "$2" --mode "$3"; }
both() { run "$1" "$2" sequential; run "$1" "$2" auto; }
runs() {
  on 0 "both 8B steady"; on 1 "both 0.6B W"; on 2 "both 8B even"
  on 3 "both 8B chat" "both 8B short" "both 8B long"
  wait
}

split="--attention-sms 36 --ffn-sms 96 --modes"
growing() { bench growing 400 --workload growing --shape 0.6B --layers 14 --batch 512 --splits 52+80; }
fallback() { bench fallback 90 --shape 0.6B --batch 512 --context 568 --modes fallback; }
power() { bench power 200 --shape 8B --batch 1024 --context 480 $split microbatch streams green --power --timeline "$out/timeline.png"; }
sizes() {
  bench 8B-1280 100 --shape 8B --batch 1280 --context 440 $split green
  bench 8B-1536 100 --shape 8B --batch 1536 --context 440 $split green
  bench 14B-768 100 --shape 14B --batch 768 --context 680 $split green
}
region() { bench region 200 --map --shapes 8B --batches 896 1024 --contexts 480 540 600 660 --modes sequential green --splits 36+96 44+88 --seconds 0.7; }
options() { job options 200 python tests/gpu/time_options.py --json "$out/options.json"; }
points() {
  on 0 growing fallback; on 1 power; on 2 sizes; on 3 region
  wait
  on 0 options
  wait
}

turn() {  # NAME ROUNDS OPTIONS...: this checkout and the older one, each first as often as the other
  local name=$1 rounds=$2 i; shift 2
  for i in $(seq "$rounds"); do
    if ((i % 2)); then older "$name-old-$i" 120 "$@"; bench "$name-$i" 120 "$@"
    else bench "$name-$i" 120 "$@"; older "$name-old-$i" 120 "$@"; fi
  done
}
decode="--modes sequential --context"
large_turns() {
  turn large 2 --shape 8B --batch 256 $decode 992
  turn best 2 --shape 8B --batch 1024 --context 480 $split green
}
nano_turns() { turn nano 2 --workload nano; }
small_turns() {
  turn one 2 --shape 0.6B --batch 1 $decode 640; turn eight 2 --shape 0.6B --batch 8 $decode 640
  turn many 1 --shape 0.6B --batch 512 $decode 568
}
turns() { on 0 large_turns; on 1 nano_turns; wait; on 0 small_turns; wait; }

of_ranks() {  # RANKS [SEQUENCES]; 512 fit an H100
  local model="--shape 8B --tensor-parallel-size $1" sequences=${2:-1024}
  bench "ranks-$1-$sequences" 120 $model --batch "$sequences" --context 440 $split green
  bench "ranks-$1-eight" 90 $model --batch 8 $decode 640
  bench "ranks-$1-one" 90 $model --batch 1 $decode 640
}
idle_of_ranks() {  # says whether the GPUs are idle between steps
  local name
  for name in peak short; do
    bench "ranks-$1-$name" 120 --workload throughput --shape 8B --requests $name --tensor-parallel-size "$1"
  done
}
between() {
  job "all-reduce-$1" 120 python tests/gpu/time_all_reduce.py --ranks "$1" --json "$out/all-reduce-$1.json"
  job "sampling-$1" 120 python tests/gpu/time_sampling.py --ranks "$1" --json "$out/sampling-$1.json"
}
ranks() {
  on 0,1 "of_ranks 2"; on 2 "of_ranks 1"; wait
  of_ranks 4; idle_of_ranks 4; between 4
  on 0,1 "between 2"; wait
}

for group in "$@"; do eval "$group"; done
