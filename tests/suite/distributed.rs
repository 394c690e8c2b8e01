//! Collective operations between ranks: threads of this process over Gloo, and NCCL with one rank on a card.

use crate::common::{alone, card};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};
use tch::{Cuda, Device, Kind, Tensor};
use tinyllama::ffi::{Backend, ProcessGroup, ReduceOp, TcpStore, nccl_versions, versions};

const LONG: Duration = Duration::from_secs(60);
const KINDS: [Kind; 5] = [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half, Kind::Int64];
const OPS: [ReduceOp; 3] = [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max];

fn gloo(store: &TcpStore, name: &str, rank: usize, size: usize, timeout: Duration) -> ProcessGroup {
    let here = Some("127.0.0.1");
    ProcessGroup::new(store, name, Backend::Gloo, rank, size, Device::Cpu, here, timeout).unwrap()
}

/// Runs `work` on a thread and a rank for each of the inputs; what they return, in order of rank.
fn on_ranks<I: Send, O: Send>(
    inputs: Vec<I>,
    work: impl Fn(&ProcessGroup, I) -> O + Sync,
) -> Vec<O> {
    let store = TcpStore::serve(0, LONG).unwrap();
    let size = inputs.len();
    let run = |(rank, input)| {
        let group = gloo(&store, "test", rank, size, LONG);
        let output = work(&group, input);
        group.barrier().unwrap();
        group.finish().unwrap();
        output
    };
    let run = &run;
    thread::scope(|scope| {
        let ranks = inputs.into_iter().enumerate();
        let threads: Vec<_> = ranks.map(|part| scope.spawn(move || run(part))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// For each rank random whole numbers, whose sums are exact in every dtype.
fn random(ranks: usize, elements: i64, kind: Kind) -> Vec<Tensor> {
    let _alone = alone();
    tch::manual_seed(5);
    let one = |_| Tensor::randint_low(-9, 10, [elements], (Kind::Int64, Device::Cpu)).to_kind(kind);
    (0..ranks).map(one).collect()
}

/// Over all ranks, in fp64 and rounded once.
fn reduced(inputs: &[Tensor], op: ReduceOp) -> Tensor {
    let all = Tensor::stack(inputs, 0);
    let kind = all.kind();
    let all = all.to_kind(Kind::Double);
    let result = match op {
        ReduceOp::Sum => all.sum_dim_intlist([0i64].as_slice(), false, Kind::Double),
        ReduceOp::Avg => all.mean_dim([0i64].as_slice(), false, Kind::Double),
        ReduceOp::Max => all.amax([0i64], false),
    };
    // As the groups do it: 16-bit numbers by way of fp32.
    let result = if matches!(kind, Kind::Double | Kind::Int64) {
        result
    } else {
        result.to_kind(Kind::Float)
    };
    result.to_kind(kind)
}

fn copies(tensors: &[Tensor]) -> Vec<Tensor> {
    tensors.iter().map(Tensor::copy).collect()
}

fn part(whole: &Tensor, rank: usize, ranks: usize) -> Tensor {
    let n = whole.size()[0] / ranks as i64;
    whole.narrow(0, rank as i64 * n, n)
}

#[test]
fn collectives_agree_with_plain_sums_on_one_to_four_ranks() {
    for ranks in 1..=4 {
        let mut cases = vec![];
        for kind in KINDS {
            let inputs = random(ranks, 60 * ranks as i64, kind);
            for op in OPS {
                if op != ReduceOp::Avg || kind != Kind::Int64 {
                    cases.push((op, copies(&inputs), reduced(&inputs, op)));
                }
            }
        }
        let of_rank = |rank: usize| -> Vec<(ReduceOp, Tensor)> {
            cases.iter().map(|(op, inputs, _)| (*op, inputs[rank].copy())).collect()
        };
        let got = on_ranks((0..ranks).map(of_rank).collect(), |group, inputs| {
            assert_eq!(group.size(), ranks);
            let all = inputs.into_iter().map(|(op, whole)| {
                let shard = part(&whole, group.rank(), ranks).zeros_like();
                group.reduce_scatter_into(&shard, &whole, op).unwrap().wait().unwrap();
                let gathered = whole.zeros_like();
                group.all_gather_into(&gathered, &shard).unwrap().wait().unwrap();
                group.all_reduce(&whole, op).unwrap().wait().unwrap();
                (shard, gathered, whole)
            });
            all.collect::<Vec<_>>()
        });
        for (rank, results) in got.iter().enumerate() {
            for ((op, _, want), (shard, gathered, whole)) in cases.iter().zip(results) {
                let at = format!("{ranks} ranks, {:?}, {op:?}, rank {rank}", want.kind());
                assert_eq!(whole, want, "all_reduce, {at}");
                assert_eq!(*shard, part(want, rank, ranks), "reduce_scatter, {at}");
                assert_eq!(gathered, want, "all_gather, {at}");
            }
        }
    }
}

#[test]
fn broadcast_gives_all_ranks_the_roots_tensor() {
    let inputs = random(3, 30, Kind::Float);
    let kinds = [Kind::BFloat16, Kind::Int64, Kind::Bool];
    let got = on_ranks(copies(&inputs), |group, t| {
        let from = |(root, kind)| {
            let t = t.to_kind(kind);
            group.broadcast(&t, root).unwrap().wait().unwrap();
            t
        };
        kinds.into_iter().enumerate().map(from).collect::<Vec<_>>()
    });
    for (root, kind) in kinds.into_iter().enumerate() {
        let want = inputs[root].to_kind(kind);
        assert!(got.iter().all(|tensors| tensors[root] == want), "{kind:?} from rank {root}");
    }
}

#[test]
fn a_shard_may_lie_in_the_whole_where_it_belongs_and_nowhere_else() {
    for ranks in [1, 2, 3] {
        let inputs = random(ranks, 12 * ranks as i64, Kind::BFloat16);
        let want = reduced(&inputs, ReduceOp::Sum);
        let got = on_ranks(copies(&inputs), |group, whole| {
            let shard = part(&whole, group.rank(), ranks);
            group.reduce_scatter_into(&shard, &whole, ReduceOp::Sum).unwrap().wait().unwrap();
            group.all_gather_into(&whole, &shard).unwrap().wait().unwrap();
            if ranks > 1 {
                let other = part(&whole, (group.rank() + 1) % ranks, ranks);
                let error = group.all_gather_into(&whole, &other).unwrap_err().to_string();
                let own = format!("must start at element {}", 12 * group.rank());
                assert!(error.contains(&own), "{error}");
                assert!(group.reduce_scatter_into(&other, &whole, ReduceOp::Sum).is_err());
            }
            whole
        });
        assert!(got.iter().all(|whole| *whole == want), "{ranks} ranks");
    }
}

#[test]
fn many_operations_may_be_in_flight() {
    let inputs: Vec<Vec<Tensor>> = (0..20).map(|_| random(2, 1000, Kind::Float)).collect();
    let of_rank = |rank: usize| inputs.iter().map(|t| t[rank].copy()).collect::<Vec<_>>();
    let got = on_ranks(vec![of_rank(0), of_rank(1)], |group, tensors| {
        let start = |t| group.all_reduce(t, ReduceOp::Sum).unwrap();
        let works: Vec<_> = tensors.iter().map(start).collect();
        works.into_iter().rev().for_each(|work| work.wait().unwrap());
        tensors
    });
    for (i, input) in inputs.iter().enumerate() {
        let want = reduced(input, ReduceOp::Sum);
        assert!(got.iter().all(|tensors| tensors[i] == want), "operation {i}");
    }
}

#[test]
fn nothing_is_recorded_for_a_backward_pass() {
    let leaf = |_| Tensor::ones([4], (Kind::BFloat16, Device::Cpu)).set_requires_grad(true);
    let got = on_ranks((0..2).map(leaf).collect(), |group, t: Tensor| {
        group.all_reduce(&t, ReduceOp::Sum).unwrap().wait().unwrap();
        let whole = Tensor::zeros([8], (Kind::BFloat16, Device::Cpu));
        group.all_gather_into(&whole, &t).unwrap().wait().unwrap();
        (t, whole)
    });
    for (t, whole) in got {
        assert!(t.is_leaf() && t.requires_grad() && !whole.requires_grad());
        assert_eq!(whole, whole.full_like(2.0));
    }
}

#[test]
fn bad_arguments_are_refused_with_expected_and_got() {
    let errors = on_ranks(vec![(), ()], |group, ()| {
        let zeros = |n: i64, kind| Tensor::zeros([n], (kind, Device::Cpu));
        let (whole, shard) = (zeros(8, Kind::Float), zeros(4, Kind::Float));
        let errors = [
            group.all_gather_into(&whole, &zeros(3, Kind::Float)),
            group.all_gather_into(&whole, &zeros(4, Kind::Half)),
            group.reduce_scatter_into(&shard.view([2, 2]).tr(), &whole, ReduceOp::Sum),
            group.all_reduce(&zeros(4, Kind::Int64), ReduceOp::Avg),
            group.broadcast(&whole, 2),
        ];
        // An operation on nothing is done at once, and a refused one leaves the group as it was.
        let nothing = zeros(0, Kind::Float);
        group.all_gather_into(&nothing, &nothing.copy()).unwrap().wait().unwrap();
        group.check().unwrap();
        errors.map(|result| result.unwrap_err().to_string())
    });
    let want = [
        "all_gather: whole must have 2 x 3 = 6 elements, got 8",
        "all_gather: whole and shard must have one dtype, got Float and Half",
        "reduce_scatter: shard must be contiguous, got strides [1, 2] for shape [2, 2]",
        "all_reduce: avg takes floating-point numbers, got Long",
        "broadcast: root must be below 2, got 2",
    ];
    assert_eq!(errors, [want.map(String::from), want.map(String::from)]);

    let store = TcpStore::serve(0, LONG).unwrap();
    let new = |backend, rank, device| {
        ProcessGroup::new(&store, "bad", backend, rank, 2, device, None, LONG).unwrap_err()
    };
    let error = new(Backend::Gloo, 2, Device::Cpu).to_string();
    assert_eq!(error, "rank must be below the group's size 2, got 2");
    let error = new(Backend::Nccl, 0, Device::Cpu).to_string();
    assert!(error.starts_with("NCCL does not work on Cpu"), "{error}");
}

#[test]
fn ranks_that_never_come_are_named_with_the_store_and_the_wait() {
    let store = TcpStore::serve(0, LONG).unwrap();
    let wait = Duration::from_millis(300);
    let began = Instant::now();
    let cpu = Device::Cpu;
    let error = ProcessGroup::new(&store, "lonely", Backend::Gloo, 1, 4, cpu, None, wait);
    let error = format!("{:#}", error.unwrap_err());
    let want = format!(
        "3 of 4 ranks did not join group `lonely` at 127.0.0.1:{} within 300ms: rank 0, 2, 3",
        store.port()
    );
    assert!(error.starts_with(&want), "{error}");
    assert!(began.elapsed() < Duration::from_secs(10));
    let error = ProcessGroup::new(&store, "lonely", Backend::Gloo, 1, 4, cpu, None, wait);
    let error = error.unwrap_err().to_string();
    assert!(error.starts_with("rank 1 joined group `lonely` 2 times"), "{error}");
}

#[test]
fn a_store_that_nobody_serves_is_named_with_host_port_and_wait() {
    let port = TcpStore::serve(0, LONG).unwrap().port();
    let error = TcpStore::connect("127.0.0.1", port, Duration::from_secs(1)).unwrap_err();
    let want = format!("no store of ranks answers at 127.0.0.1:{port} within 1s");
    assert_eq!(error.to_string(), want);

    let store = TcpStore::serve(0, LONG).unwrap();
    let error = format!("{:#}", TcpStore::serve(store.port(), LONG).unwrap_err());
    let want = format!("cannot serve the ranks' store at port {}: ", store.port());
    assert!(error.starts_with(&want), "{error}");
}

#[test]
fn a_store_serves_many_threads_while_some_of_them_wait() {
    let store = TcpStore::serve(0, LONG).unwrap();
    let other = TcpStore::connect("localhost", store.port(), LONG).unwrap();
    thread::scope(|scope| {
        let waiting: Vec<_> = (0..4).map(|_| scope.spawn(|| store.get("late").unwrap())).collect();
        let adding: Vec<_> = (0..4).map(|_| scope.spawn(|| other.add("count", 5))).collect();
        adding.into_iter().for_each(|thread| assert!(thread.join().unwrap().unwrap() % 5 == 0));
        assert!(!store.check("late").unwrap());
        other.set("late", &[0, 255, 7]).unwrap();
        assert!(store.check("late").unwrap());
        waiting.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), [0, 255, 7]));
    });
    assert_eq!(store.add("count", 1).unwrap(), 21);
    assert_eq!(store.get("count").unwrap(), b"21");
    store.set("nothing", &[]).unwrap();
    assert_eq!(store.get("nothing").unwrap(), b"");
    store.wait(&["late", "count"], LONG).unwrap();

    assert_eq!(store.compare_set("leader", b"", b"a").unwrap(), b"a");
    assert_eq!(other.compare_set("leader", b"", b"b").unwrap(), b"a");
    assert_eq!(other.compare_set("leader", b"a", b"b").unwrap(), b"b");

    let error = format!("{:#}", store.wait(&["never"], Duration::from_millis(50)).unwrap_err());
    let want =
        format!("waited 50ms in vain for `never` in the store at 127.0.0.1:{}", store.port());
    assert_eq!(error, want);
    assert_eq!(store.get("count").unwrap(), b"21", "a wait that failed breaks nothing");
}

#[test]
fn groups_share_a_store_under_different_names() {
    let store = TcpStore::serve(0, LONG).unwrap();
    let sums = Mutex::new(vec![]);
    thread::scope(|scope| {
        for rank in 0..3 {
            let (store, sums) = (&store, &sums);
            scope.spawn(move || {
                let all = gloo(store, "all", rank, 3, LONG);
                let pair = (rank < 2).then(|| gloo(store, "pair", 1 - rank, 2, LONG));
                for group in [Some(&all), pair.as_ref()].into_iter().flatten() {
                    let t = Tensor::from(1 + rank as i64);
                    group.all_reduce(&t, ReduceOp::Sum).unwrap().wait().unwrap();
                    sums.lock().unwrap().push(t.int64_value(&[]));
                }
                all.barrier().unwrap();
            });
        }
    });
    let mut sums = sums.into_inner().unwrap();
    sums.sort();
    assert_eq!(sums, [3, 3, 6, 6, 6]);
}

/// Two ranks, of which the second never takes part in an all-reduce; what the first is told.
fn left_alone(timeout: Duration, act: impl Fn(&ProcessGroup, ProcessGroup)) -> (String, Duration) {
    let store = TcpStore::serve(0, LONG).unwrap();
    thread::scope(|scope| {
        let second = scope.spawn(|| gloo(&store, "test", 1, 2, timeout));
        let first = gloo(&store, "test", 0, 2, timeout);
        let second = second.join().unwrap();
        let t = Tensor::ones([4], (Kind::Float, Device::Cpu));
        let work = first.all_reduce(&t, ReduceOp::Sum).unwrap();
        let began = Instant::now();
        act(&first, second);
        let error = format!("{:#}", work.wait().unwrap_err());
        let waited = began.elapsed();
        assert!(first.check().is_err() && first.all_reduce(&t, ReduceOp::Sum).is_err());
        (error, waited)
    })
}

#[test]
fn a_rank_that_dies_or_stays_away_or_an_abort_ends_the_wait_with_an_error() {
    let (error, waited) = left_alone(LONG, |_, second| drop(second));
    assert!(error.starts_with("a collective operation failed: "), "{error}");
    assert!(waited < LONG / 2, "{waited:?} for a connection that was closed");

    let held = Mutex::new(None);
    let hold = |_: &ProcessGroup, second| *held.lock().unwrap() = Some(second);
    let (error, waited) = left_alone(Duration::from_millis(500), hold);
    assert!(error.contains("500ms"), "{error}");
    assert!(waited < LONG / 2, "{waited:?} for a timeout of 500 ms");

    let (error, waited) = left_alone(LONG, |first, second| {
        *held.lock().unwrap() = Some(second);
        first.abort().unwrap();
    });
    assert_eq!(error, "a collective operation failed: gloo: the group was aborted");
    assert!(waited < LONG / 2, "{waited:?} for an abort");
}

#[test]
fn nccl_tells_its_versions_or_why_it_is_not_there() {
    match nccl_versions() {
        Ok(nccl) => assert_eq!(nccl.built, versions().nccl),
        Err(error) => {
            let reasons = ["built without", "no GPU is visible"];
            assert!(reasons.iter().any(|text| error.to_string().contains(text)), "{error}");
        }
    }
    if Cuda::is_available() {
        return;
    }
    let store = TcpStore::serve(0, LONG).unwrap();
    let card = Device::Cuda(0);
    let error = ProcessGroup::new(&store, "no card", Backend::Nccl, 0, 1, card, None, LONG);
    let error = format!("{:#}", error.unwrap_err());
    let want = "rank 0 cannot connect group `no card` over NCCL: ";
    assert!(error.starts_with(want) && error.len() > want.len(), "{error}");
}

#[test]
fn bench_comm_measures_and_checks_both_operations() {
    let args = ["bench", "comm", "--ranks", "3", "--sizes", "1", "--repeats", "1", "--json"];
    let output = assert_cmd::cargo::cargo_bin_cmd!("tinyllama").args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["ranks"], &report["backend"]), (&3.into(), &"Gloo".into()));
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for (row, op) in rows.iter().zip(["all_gather", "reduce_scatter"]) {
        assert_eq!((&row["op"], &row["wrong"]), (&op.into(), &0.into()), "{row}");
        // The nearest below 1 MiB that three ranks of bf16 share.
        assert_eq!(row["bytes"], (1 << 20) / 6 * 6);
        let number = |key: &str| row[key].as_f64().unwrap();
        let (bytes, seconds) = (number("bytes"), number("us") / 1e6);
        assert!((number("algorithm_gb_s") * 1e9 * seconds / bytes - 1.0).abs() < 1e-9);
        assert!((number("bus_gb_s") / number("algorithm_gb_s") - 2.0 / 3.0).abs() < 1e-9);
    }
}

#[test]
fn nccl_with_one_rank_leaves_every_tensor_as_it_is() {
    let Some((device, _card)) = card("nccl_with_one_rank_leaves_every_tensor_as_it_is") else {
        return;
    };
    let store = TcpStore::serve(0, LONG).unwrap();
    let new =
        |name| ProcessGroup::new(&store, name, Backend::Nccl, 0, 1, device, None, LONG).unwrap();
    let (group, second) = (new("a"), new("b"));
    for kind in KINDS {
        let want = Tensor::randint_low(-9, 10, [64], (Kind::Int64, device)).to_kind(kind);
        let whole = want.copy();
        for op in OPS {
            if op == ReduceOp::Avg && kind == Kind::Int64 {
                assert!(group.all_reduce(&whole, op).is_err());
                continue;
            }
            group.all_reduce(&whole, op).unwrap().wait().unwrap();
            let shard = whole.zeros_like();
            group.reduce_scatter_into(&shard, &whole, op).unwrap().wait().unwrap();
            second.all_gather_into(&whole, &shard).unwrap().wait().unwrap();
            group.reduce_scatter_into(&whole, &whole, op).unwrap().wait().unwrap();
            group.all_gather_into(&whole, &whole).unwrap().wait().unwrap();
            second.broadcast(&whole, 0).unwrap().wait().unwrap();
            assert_eq!(whole, want, "{kind:?}, {op:?}");
        }
    }
    group.barrier().unwrap();
    let error = group.all_reduce(&Tensor::from(1.0), ReduceOp::Sum).unwrap_err().to_string();
    assert!(error.contains("must be on cuda:0 like the group, got cpu"), "{error}");
    group.check().unwrap();
    group.finish().unwrap();
    second.abort().unwrap();
    let error = second.check().unwrap_err().to_string();
    assert!(error.contains("was aborted"), "{error}");
}
