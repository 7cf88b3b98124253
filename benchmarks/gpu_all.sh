#!/usr/bin/env bash
# The first thirty minutes on a GPU, in parts of at most ten minutes each.
#
#   bash benchmarks/gpu_all.sh              all parts that have not ended in OUT yet
#   bash benchmarks/gpu_all.sh sft_1b ppo   these
#   TOY=1 bash benchmarks/gpu_all.sh        a rehearsal without a GPU, with toy shapes
#
# OUT (by default benchmarks/results/gpu) gets a log and the results of each part as it goes, and a file
# PART.done when it has ended well. PYTHON is the interpreter, by default that of the environment.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=$(realpath -m "${OUT:-benchmarks/results/gpu}")
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
TOY=${TOY:-}
LIMIT=${LIMIT:-590} # seconds of a part
PARTS="tests collective demo sft_1b sft_7b profile decode_1b decode_8b quantized ppo"
mkdir -p "$OUT"

# pick SHAPE: the shape, or the toy's in a rehearsal
pick() { if [ -n "$TOY" ]; then echo toy; else echo "$1"; fi; }
sizes() { if [ -n "$TOY" ]; then echo "$1"; else echo "$2"; fi; }
trained() { "$PYTHON" -m pipeline run "output_dir=$OUT/runs" tracking=off model.dtype=bf16 "$@"; }

part_tests() { # attention over a whole row, prefixes, frozen models: what is marked gpu
    "$PYTHON" -m pytest -m gpu -n 0 -rs tests/common
}

part_collective() { # one all-reduce over the device's own library
    "$PYTHON" - <<'END'
import torch
import torch.distributed as dist

from common.runtime.distributed import close_world, init_world

world = init_world()
ones = torch.ones(1 << 20, device=world.device)
dist.all_reduce(ones)
assert bool((ones == world.size).all())
print(f"{dist.get_backend()}: the sum over {world.size} rank(s) is right")
close_world()
END
}

part_demo() { # all three steps, killed once, and gone on with
    timeout -s KILL "$(sizes 20 40)" "$PYTHON" -m pipeline run experiment=demo "output_dir=$OUT/runs" \
        run_name=demo tracking=off model.dtype=bf16
    trained experiment=demo run_name=demo && "$PYTHON" -m pipeline verify "$OUT/runs/demo"
}

part_sft_1b() { "$PYTHON" -m benchmarks.sft_gpu --shape "$(pick 1b)" --length $(sizes 64 "2048 8192") --results "$OUT"; }
part_sft_7b() { "$PYTHON" -m benchmarks.sft_gpu --shape "$(pick 7b)" --length $(sizes 128 2048) --results "$OUT"; }
part_profile() { "$PYTHON" -m benchmarks.sft_gpu --shape "$(pick 1b)" --length $(sizes 64 2048) --profile --results "$OUT/profile"; }
part_decode_1b() { "$PYTHON" -m benchmarks.decode_gpu --shape "$(pick 1b)" $(sizes "--slots 4 --response 8" "") --results "$OUT"; }
part_decode_8b() { "$PYTHON" -m benchmarks.decode_gpu --shape "$(pick 8b)" $(sizes "--slots 4 --response 8" "") --results "$OUT"; }

part_quantized() { # 4-bit weights under adapters, then 8-bit AdamW, of the demo's policy
    trained experiment=demo 'steps=[sft]' run_name=base
    trained experiment=demo 'steps=[sft]' run_name=nf4 "model.path=$OUT/runs/base" model=lora model.quantize=nf4 &&
        trained experiment=demo 'steps=[sft]' run_name=adamw_8bit sft.optim.name=adamw_8bit
}

part_ppo() { "$PYTHON" -m benchmarks.ppo_gpu --shape "$(pick 0.5b)" $(sizes "--iterations 2" "") --results "$OUT"; }

failed=""
for part in ${*:-$PARTS}; do
    if ! declare -F "part_$part" >/dev/null; then
        echo "no part '$part'; there are: $PARTS" >&2
        exit 2
    fi
    if [ -e "$OUT/$part.done" ]; then
        echo "$part: ended before ($OUT/$part.done)"
        continue
    fi
    began=$SECONDS
    export -f "part_$part" trained pick sizes
    if OUT="$OUT" PYTHON="$PYTHON" TOY="$TOY" timeout -k 10 "$LIMIT" bash -c "part_$part" >"$OUT/$part.log" 2>&1; then
        echo "$part: done in $((SECONDS - began)) s"
        date -u +%FT%TZ >"$OUT/$part.done"
    else
        echo "$part: FAILED in $((SECONDS - began)) s; the end of $OUT/$part.log:"
        tail -n 15 "$OUT/$part.log"
        failed="$failed $part"
    fi
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
