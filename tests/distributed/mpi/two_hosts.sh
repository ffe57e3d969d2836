#!/usr/bin/env bash
# Four ranks on two machines, as far as one machine can have two: namespaces of network, host name
# and processes, joined by a pair of virtual cards. A rank of the second is stopped or killed, the
# second freezes, the link is cut: each job ends in time and names a rank of the second machine.
#   two_hosts.sh MPIRUN FAULTY          77: cannot be done here
#
# Every case has machines of its own: over a link that was cut a moment ago, a connection may fail
# at once ("no route to host": the search for the neighbour was given up while the link was down),
# and mpirun waits for ever for a daemon to which that happens.
set -uo pipefail
mpirun=$1 faulty=$2
folder=$(mktemp -d)
inits=() a= b=
export LC_ALL=C TMPDIR=$folder OMP_NUM_THREADS=1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
failed=0

inside() {  # processes on a machine, but for its first
  local ns p
  ns=$(readlink "/proc/$1/ns/net")
  for p in /proc/[0-9]*; do
    [[ $(readlink "$p/ns/net" 2>/dev/null) == "$ns" ]] && echo "${p#/proc/}"
  done | grep -vx "$1"
}
on_a() { nsenter -t "$a" -n -u -- "$@"; }
on_b() { nsenter -t "$b" -n -u -p -m -- "$@"; }
processes() { local pids; pids=$(inside "$1" | paste -sd,); [[ -z $pids ]] || ps -o pid=,stat=,args= -p "$pids"; }
ranks_on() { processes "$1" | grep -F "$faulty" | grep -vF "$mpirun"; }

remove() {
  local pid
  # The first machine has no namespace of processes that would take them along.
  [[ -z $a ]] || kill -KILL $(inside "$a") 2>/dev/null
  for pid in "${inits[@]}"; do kill -KILL "$pid" 2>/dev/null; wait "$pid" 2>/dev/null; done
  inits=() a= b=
}
trap 'remove; rm -rf "$folder"' EXIT

host() {  # name, more namespaces: a machine; its first process sleeps
  rm -f "$folder/$1"
  unshare --net --uts --fork --kill-child "${@:2}" bash -c \
    "hostname $1; ip link set lo up; echo ready; exec sleep 600" > "$folder/$1" 2>&1 &
  local outer=$!
  inits+=("$outer")
  for _ in $(seq 100); do grep -qs ready "$folder/$1" && break; sleep 0.1; done
  grep -qs ready "$folder/$1" || return 1
  pid=$(pgrep -P "$outer")
}

answers() { [[ $("$1" bash -c "echo > /dev/tcp/$2/9" 2>&1) == *"Connection refused"* ]]; }

machines() {  # two of them, with a link over which both have answered
  host hosta && a=$pid && host hostb --pid --mount --mount-proc && b=$pid || { echo "no namespaces here"; return 77; }
  ip link add name reprise-a netns "$a" type veth peer name reprise-b netns "$b" || { echo "no virtual cards here"; return 77; }
  on_a ip addr add 10.77.0.1/24 dev reprise-a; on_a ip link set reprise-a up
  on_b ip addr add 10.77.0.2/24 dev reprise-b; on_b ip link set reprise-b up
  cat > "$folder/agent" <<AGENT
#!/usr/bin/env bash
shift
exec nsenter -t $b -n -u -p -m -- bash -c "\$*"
AGENT
  chmod +x "$folder/agent"
  for _ in $(seq 100); do
    answers on_a 10.77.0.2 && answers on_b 10.77.0.1 && return 0
    sleep 0.1
  done
  echo "the link between the machines carries nothing"
  return 1
}

# Starts the job and waits for rank 3's first word. Open MPI sometimes does not get as far as our
# program: that, and only that, is tried again, twice at most.
launch() {  # fault, culprit
  local attempt
  for attempt in 1 2 3; do
    machines || return
    on_a timeout -k 1 200 "$mpirun" --host hosta:2,hostb:2 --mca plm_rsh_agent "$folder/agent" \
      --mca plm_rsh_no_tree_spawn 1 --mca btl tcp,self -n 4 "$faulty" "$1" "$2" > "$folder/out" 2>&1 &
    job=$!
    local begin=$SECONDS patience=40
    while kill -0 "$job" 2>/dev/null && (( SECONDS - begin < patience )); do
      grep -qs "rank 3 of 4" "$folder/out" && return 0
      # Once our program is there its own limit holds (60 s for the start of MPI).
      [[ $patience == 90 || -z $(ranks_on "$a"; ranks_on "$b") ]] || patience=90
      sleep 0.1
    done
    grep -qs "rank [0-9] of 4\|reprise" "$folder/out" && return 0  # judged by what it says
    [[ $patience == 40 ]] || break
    echo "mpirun has started no rank within $(( SECONDS - begin )) s (attempt $attempt of 3); its output:"
    cat "$folder/out"
    echo "on hosta:"; processes "$a"; echo "on hostb:"; processes "$b"
    remove
  done
  [[ -z $a ]] || { echo "rank 3 says nothing within $patience s; on hosta:"; processes "$a"; echo "on hostb:"; processes "$b"; cat "$folder/out"; }
  return 1
}

left() {  # machine, name, seconds that it may take
  local rest
  for _ in $(seq "$(( 10 * $3 ))"); do rest=$(ranks_on "$1"); [[ -z $rest ]] && return; sleep 0.1; done
  echo "left on $2: $rest"; failed=1
}

case_of() {  # what, fault, culprit, words, seconds for the second machine to be empty, what breaks
  launch "$2" "$3"
  local started=$?
  (( started != 77 )) || exit 77
  if (( started != 0 )); then echo "$1: WRONG: not started"; failed=1; remove; return; fi
  local begin=$SECONDS code text wrong=
  if [[ -n ${6:-} ]]; then sleep 0.5; begin=$SECONDS; eval "$6"; fi
  wait "$job"; code=$?
  local took=$(( SECONDS - begin ))
  text=$(< "$folder/out")
  [[ $2 == none || $code != 0 ]] || wrong+=" exit code 0;"
  [[ $2 != none || $code == 0 ]] || wrong+=" exit code $code;"
  (( took < 33 )) || wrong+=" took $took s;"
  grep -qE "$4" <<< "$text" || wrong+=" does not say $4;"
  echo "$1: exit code $code after $took s${wrong:+: WRONG:$wrong}"
  if [[ -n $wrong ]]; then echo "$text"; failed=1; fi
  left "$a" hosta 2
  [[ -z $5 ]] || left "$b" hostb "$5"
  remove
}

silent="reprise: rank [23] \(host hostb, pid [0-9]+\) does not answer"
case_of "no fault" none 0 "rank 3 of 4" 2
case_of "rank 3 stopped" stop@forward 3 "reprise: rank 3 \(host hostb, pid [0-9]+\) does not answer" 2
case_of "rank 3 killed" kill@forward 3 "reprise: rank 3 \(host hostb, pid [0-9]+\) ended without finishing" 2
# The far side of a cut link hears of no verdict; it comes to its own.
case_of "link cut" long@forward 3 "$silent" 15 'on_a ip link set reprise-a down'
case_of "machine frozen" long@forward 3 "$silent" "" 'kill -STOP $(inside "$b")'
exit $failed
