#!/usr/bin/env bash
# Four ranks on two machines, as far as one machine can have two: namespaces of network, host name
# and processes, joined by a pair of virtual cards. A rank of the second is stopped, the second
# freezes, the link is cut: each job ends in time and names a rank of the second machine.
#   two_hosts.sh MPIRUN FAULTY          77: cannot be done here
set -uo pipefail
mpirun=$1 faulty=$2
folder=$(mktemp -d)
inits=()
cleanup() {
  # With all that is inside.
  for pid in "${inits[@]}"; do kill -KILL "$pid" 2>/dev/null; wait "$pid" 2>/dev/null; done
  rm -rf "$folder"
}
trap cleanup EXIT

host() {  # name, more namespaces: a machine; its first process sleeps
  unshare --net --uts --fork --kill-child "${@:2}" bash -c \
    "hostname $1; ip link set lo up; echo ready; exec sleep 300" > "$folder/$1" &
  local outer=$!
  inits+=("$outer")
  for _ in $(seq 50); do grep -qs ready "$folder/$1" && break; sleep 0.1; done
  grep -qs ready "$folder/$1" || return 1
  pid=$(pgrep -P "$outer")
}
host hosta && a=$pid && host hostb --pid --mount --mount-proc && b=$pid || { echo "no namespaces here"; exit 77; }
ip link add name reprise-a netns "$a" type veth peer name reprise-b netns "$b" || { echo "no virtual cards here"; exit 77; }
on_a() { nsenter -t "$a" -n -u -- "$@"; }
on_b() { nsenter -t "$b" -n -u -p -m -- "$@"; }
on_a ip addr add 10.77.0.1/24 dev reprise-a; on_a ip link set reprise-a up
on_b ip addr add 10.77.0.2/24 dev reprise-b; on_b ip link set reprise-b up
cat > "$folder/agent" <<AGENT
#!/usr/bin/env bash
shift
exec nsenter -t $b -n -u -p -m -- bash -c "\$*"
AGENT
chmod +x "$folder/agent"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
failed=0
inside() { local ns; ns=$(readlink "/proc/$1/ns/net"); for p in /proc/[0-9]*; do [[ $(readlink "$p/ns/net" 2>/dev/null) == "$ns" ]] && echo "${p#/proc/}"; done | grep -vx "$1"; }

job() {  # what, fault, culprit, words, the command that breaks something
  local begin=$SECONDS code text
  on_a timeout -k 1 60 "$mpirun" --host hosta:2,hostb:2 --mca plm_rsh_agent "$folder/agent" \
    --mca plm_rsh_no_tree_spawn 1 --mca btl tcp,self -n 4 "$faulty" "$2" "$3" > "$folder/out" 2>&1 &
  local pid=$!
  if [[ -n ${5:-} ]]; then
    for _ in $(seq 200); do grep -qs "rank 3 of 4" "$folder/out" && break; sleep 0.1; done
    sleep 0.5
    eval "$5"
  fi
  wait "$pid"; code=$?
  text=$(< "$folder/out")
  local wrong=
  [[ $2 == none || $code != 0 ]] || wrong="exit code 0"
  [[ $2 != none || -n ${5:-} || $code == 0 ]] || wrong="exit code $code"
  (( SECONDS - begin < 33 )) || wrong="took $(( SECONDS - begin )) s"
  grep -qE "$4" <<< "$text" || wrong="does not say $4"
  echo "$1: exit code $code after $(( SECONDS - begin )) s${wrong:+: WRONG: $wrong}"
  if [[ -n $wrong ]]; then echo "$text"; failed=1; fi
}
freeze() { kill -STOP $(inside "$b"); }
left() { sleep 1; local rest; rest=$(inside "$1" | xargs -r -n1 ps -o args= -p | grep "$faulty"); [[ -z $rest ]] || { echo "left on $2: $rest"; failed=1; }; }

job "no fault" none 0 "rank 3 of 4"
job "rank 3 stopped" stop@forward 3 "reprise: rank 3 \(host hostb, pid [0-9]+\) does not answer"
left "$a" hosta; left "$b" hostb
job "rank 3 killed" kill@forward 3 "reprise: rank 3 \(host hostb, pid [0-9]+\) ended without finishing"
left "$a" hosta; left "$b" hostb
job "link cut" slow@forward 3 "reprise: rank [23] \(host hostb, pid [0-9]+\) does not answer" \
  'on_a ip link set reprise-a down'
left "$a" hosta
sleep 6
left "$b" hostb
on_a ip link set reprise-a up
job "machine frozen" slow@forward 3 "reprise: rank [23] \(host hostb, pid [0-9]+\) does not answer" freeze
left "$a" hosta
exit $failed
