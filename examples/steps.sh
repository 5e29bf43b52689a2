# Sourced by the scripts beside it: a chain whose finished steps are not repeated. Wants PYTHON, the interpreter.

# step NAME COMMAND...: run it once; keep what it wrote, and its seconds
step() {
    local name="$1"
    shift
    [ -f "$name.seconds" ] && return
    mkdir -p "$(dirname "$name")"
    echo "+ $*" >&2
    local began
    began="$(date +%s.%N)"
    "$@" > "$name.out" 2> "$name.log" || { tail -n 5 "$name.log" >&2; exit 1; }
    echo "$(date +%s.%N) $began" | awk '{printf "%.1f\n", $1 - $2}' > "$name.seconds"
}
balms() { "$PYTHON" -m balms_cli "$@"; }
