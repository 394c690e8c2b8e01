//! `prepare --hub` against a small Hub of this process: listing, downloads, resumption, refusals.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{sleep, spawn};
use std::time::Duration;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the Hub has and how it behaves.
#[derive(Default)]
struct State {
    commit: String,
    files: BTreeMap<String, Vec<u8>>,
    /// Entries of the listing that are not as the files are.
    lies: BTreeMap<String, Value>,
    token: Option<&'static str>,
    /// So many of the next answers with bytes end in their middle.
    cuts: usize,
    /// What comes then: another status.
    then: Option<u16>,
    /// Instead of ending they wait.
    stall: bool,
    /// `PATH`, `PATH from N`, `PATH with TOKEN`.
    requests: Vec<String>,
}

struct Hub {
    address: String,
    state: Arc<Mutex<State>>,
}

impl Hub {
    fn new(files: &[(&str, Vec<u8>)]) -> Self {
        let files = files.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.clone())).collect();
        let state = State { commit: COMMIT.into(), files, ..State::default() };
        let state = Arc::new(Mutex::new(state));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shared = state.clone();
        spawn(move || {
            for stream in listener.incoming() {
                let shared = shared.clone();
                // A client that is killed closes its end.
                spawn(move || drop(answer(stream.unwrap(), &shared)));
            }
        });
        Self { address, state }
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    /// The requests since the last call.
    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }

    /// `tinyllama prepare` with an environment of its own.
    fn command(&self, dir: &Path, kind: &str, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tinyllama"));
        let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/quickstart/tokenizer");
        command.args(["prepare", kind, "--tokenizer"]).arg(tokenizer).args(more);
        for name in ["ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"] {
            command.env_remove(name).env_remove(name.to_lowercase());
        }
        for name in ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "SSL_CERT_FILE"] {
            command.env_remove(name);
        }
        command.env_remove("REQUESTS_CA_BUNDLE").env("HF_HOME", dir.join("hf"));
        command.env("HF_ENDPOINT", format!("http://{}", self.address));
        command
    }

    /// Prepares `me/corpus`: exit code, stdout, stderr.
    fn prepare(&self, dir: &Path, out: &str, more: &[&str]) -> (i32, String, String) {
        let mut command = self.command(dir, "jsonl", &["--hub", "me/corpus"]);
        run(command.arg("--json").arg("--out").arg(dir.join(out)).args(more))
    }
}

fn run(command: &mut Command) -> (i32, String, String) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// One request, one answer, as the Hub gives it.
fn answer(stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut first, mut range, mut token) = (String::new(), None, None);
    reader.read_line(&mut first)?;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? < 3 {
            break;
        }
        let (name, value) = line.trim().split_once(": ").unwrap();
        match name.to_lowercase().as_str() {
            "range" => range = Some(value["bytes=".len()..].trim_end_matches('-').to_owned()),
            "authorization" => token = Some(value.to_owned()),
            _ => {}
        }
    }
    let target = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut state = state.lock().unwrap();
    let mut noted = target.clone();
    noted += &range.as_ref().map(|from| format!(" from {from}")).unwrap_or_default();
    noted += &token.as_ref().map(|token| format!(" with {token}")).unwrap_or_default();
    state.requests.push(noted);

    if let Some(path) = target.strip_prefix("/cdn/") {
        let from: usize = range.map_or(0, |from| from.parse().unwrap());
        return send(stream, state, path, from);
    }
    let host = reader.get_ref().local_addr()?;
    drop_body(stream, &api(&state, &target, token.as_deref(), &host.port().to_string()))
}

/// Status line, headers and body of all but bytes of files.
fn api(state: &State, target: &str, token: Option<&str>, port: &str) -> String {
    let body = |status: &str, headers: &str, body: &str| {
        format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len())
    };
    let missing = |code: &str| body("404 Not Found", &format!("X-Error-Code: {code}\r\n"), "");
    if state.token.is_some_and(|want| token != Some(&format!("Bearer {want}"))) {
        let said = "X-Error-Code: GatedRepo\r\nX-Error-Message: Access is restricted.\r\n";
        return body(if token.is_some() { "403 Forbidden" } else { "401 Unauthorized" }, said, "");
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let Some(at) = path.find("/datasets/me/corpus/") else { return missing("RepoNotFound") };
    let rest = &path[at + "/datasets/me/corpus/".len()..];
    let commit = &state.commit;
    if let Some(revision) = rest.strip_prefix("revision/") {
        return match ["main", "refs%2Fpr%2F1", COMMIT].contains(&revision) {
            true => body("200 OK", "", &json!({ "sha": commit, "siblings": [] }).to_string()),
            false => missing("RevisionNotFound"),
        };
    }
    if let Some(path) = rest.strip_prefix("resolve/") {
        let path = path.strip_prefix(&format!("{commit}/")).unwrap_or("none");
        // Another host: the token is not for it.
        return body("302 Found", &format!("Location: http://localhost:{port}/cdn/{path}\r\n"), "");
    }
    let folder = rest.strip_prefix("tree/").and_then(|rest| rest.strip_prefix(commit.as_str()));
    let folder = folder.unwrap().trim_start_matches('/');
    let inside = |path: &str| folder.is_empty() || path.starts_with(&format!("{folder}/"));
    let mut entries = vec![json!({ "type": "directory", "path": "data", "oid": "0", "size": 0 })];
    entries.extend(state.files.keys().filter(|path| inside(path)).map(|path| entry(state, path)));
    if entries.len() == 1 && !folder.is_empty() {
        return missing("EntryNotFound");
    }
    // Pages of two.
    let page: usize = query.split("page=").nth(1).map_or(0, |page| page.parse().unwrap());
    let mut pages = entries.chunks(2);
    let entries = pages.nth(page).unwrap();
    let next = match pages.next() {
        Some(_) => {
            let url = format!("http://127.0.0.1:{port}{path}?recursive=true&page={}", page + 1);
            format!("Link: <{url}>; rel=\"next\"\r\n")
        }
        None => String::new(),
    };
    body("200 OK", &next, &json!(entries).to_string())
}

/// A file in the listing: all but the smallest lie under LFS.
fn entry(state: &State, path: &str) -> Value {
    let bytes = &state.files[path];
    if let Some(lie) = state.lies.get(path) {
        return lie.clone();
    }
    match etag(bytes) {
        sha256 if sha256.len() == 64 => lfs(path, bytes.len(), &sha256),
        oid => json!({ "type": "file", "path": path, "size": bytes.len(), "oid": oid }),
    }
}

fn lfs(path: &str, size: usize, sha256: &str) -> Value {
    let lfs = json!({ "oid": sha256, "size": size, "pointerSize": 130 });
    json!({ "type": "file", "path": path, "size": size, "oid": "a".repeat(40), "lfs": lfs })
}

fn etag(bytes: &[u8]) -> String {
    let sha256 = format!("{:x}", Sha256::digest(bytes));
    if bytes.len() < 100 { sha256[..40].to_owned() } else { sha256 }
}

/// Bytes of a file, from the middle where it is asked for; cut where the test wants it.
fn send(
    mut stream: TcpStream,
    mut state: std::sync::MutexGuard<State>,
    path: &str,
    from: usize,
) -> std::io::Result<()> {
    if state.cuts == 0
        && let Some(status) = state.then
    {
        return drop_body(stream, &format!("HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n"));
    }
    let cut = state.cuts > 0;
    state.cuts = state.cuts.saturating_sub(1);
    let stall = state.stall;
    let bytes = state.files[&path.replace("%20", " ")].clone();
    drop(state);
    let part = &bytes[from..];
    let head = match from {
        0 => "HTTP/1.1 200 OK\r\n".to_owned(),
        _ => {
            let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
            format!("HTTP/1.1 206 Partial Content\r\nContent-Range: {range}\r\n")
        }
    };
    write!(stream, "{head}Content-Length: {}\r\nConnection: close\r\n\r\n", part.len())?;
    stream.write_all(if cut { &part[..part.len() / 2] } else { part })?;
    stream.flush()?;
    if cut && stall {
        sleep(Duration::from_secs(30));
    }
    Ok(())
}

fn drop_body(mut stream: TcpStream, text: &str) -> std::io::Result<()> {
    let head = text.replacen("Content-Length", "Connection: close\r\nContent-Length", 1);
    stream.write_all(head.as_bytes())
}

fn lines(name: &str, rows: usize) -> Vec<u8> {
    let row =
        |i: usize| json!({ "text": format!("{name} {i}: some words of it") }).to_string() + "\n";
    (0..rows).map(row).collect::<String>().into_bytes()
}

/// A dataset of three files in two folders, and what lies around.
fn corpus() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        (".gitattributes", b"*.zst filter=lfs".to_vec()),
        ("README.md", b"# A dataset".to_vec()),
        ("data/one/a b.jsonl", lines("a", 200)),
        ("data/one/b.jsonl.zst", zstd::encode_all(&lines("b", 5000)[..], 3).unwrap()),
        ("data/two/c.jsonl", lines("c", 1)),
        ("other/d.jsonl", lines("d", 10)),
    ]
}

fn packed(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|e| e == "bin"));
    files.map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap())).collect()
}

fn snapshot(dir: &Path) -> PathBuf {
    dir.join("hf/hub/datasets--me--corpus/snapshots").join(COMMIT)
}

/// Paths that are downloaded from, with the byte that it begins at.
fn downloads(requests: &[String]) -> Vec<&str> {
    requests.iter().filter_map(|request| request.strip_prefix("/cdn/")).collect()
}

#[test]
fn a_dataset_gives_the_bytes_of_its_files_and_is_downloaded_once() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let hub = Hub::new(&corpus());
    let patterns = ["--pattern", "data/*.jsonl*", "--pattern", "data/two/"];
    let (code, stdout, stderr) = hub.prepare(dir, "out", &patterns);
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("downloads   3 of 3 files of `me/corpus`, commit 0123"), "{stderr}");
    let manifest: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(manifest["commit"], COMMIT);
    let source = "hf://datasets/me/corpus@main/{data/*.jsonl*,data/two/*}";
    assert_eq!(manifest["options"]["source"], source);
    let sources: Vec<&String> = manifest["sources"].as_object().unwrap().keys().collect();
    let there = ["data/one/a b.jsonl", "data/one/b.jsonl.zst", "data/two/c.jsonl"];
    assert_eq!(sources, there.map(|p| snapshot(dir).join(p).display().to_string()).each_ref());
    for path in there {
        let want = &corpus().into_iter().find(|(p, _)| *p == path).unwrap().1;
        assert_eq!(&fs::read(snapshot(dir).join(path)).unwrap(), want);
        let link = fs::read_link(snapshot(dir).join(path)).unwrap();
        assert!(link.ends_with(Path::new("blobs").join(etag(want))), "{}", link.display());
    }
    let noted = fs::read_to_string(dir.join("hf/hub/datasets--me--corpus/refs/main")).unwrap();
    assert_eq!(noted, COMMIT);
    let requests = hub.requests();
    assert_eq!(downloads(&requests).len(), 3, "{requests:?}");
    assert!(requests.iter().all(|r| !r.contains("/tree/") || r.contains("/data?")), "{requests:?}");

    // The same files by hand.
    let local = snapshot(dir).join("data").display().to_string();
    let mut by_hand = hub.command(dir, "jsonl", &["--source", &local]);
    let (code, _, stderr) = run(by_hand.arg("--out").arg(dir.join("local")));
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(packed(&dir.join("out")), packed(&dir.join("local")));

    // What is there is not downloaded again: all files that jsonl reads are one more.
    let (code, _, stderr) = hub.prepare(dir, "all", &["--revision", "refs/pr/1"]);
    assert_eq!(code, 0, "{stderr}");
    let requests = hub.requests();
    assert_eq!(downloads(&requests), ["other/d.jsonl"], "{requests:?}");

    // What is prepared needs neither network nor cache.
    fs::remove_dir_all(dir.join("hf")).unwrap();
    let (code, again, stderr) = hub.prepare(dir, "out", &patterns);
    assert_eq!((code, again), (0, stdout), "{stderr}");
    assert!(stderr.contains("already prepared"), "{stderr}");
    assert!(hub.requests().is_empty());
    let (code, _, stderr) = hub.prepare(dir, "out", &[]);
    assert_eq!(code, 1);
    assert!(stderr.contains("now \"hf://datasets/me/corpus@main\""), "{stderr}");
}

#[test]
fn a_download_goes_on_where_the_connection_or_the_program_ended() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let hub = Hub::new(&corpus());
    let size = |path: &str| corpus().into_iter().find(|(p, _)| *p == path).unwrap().1.len();
    let (first, half) = ("data/one/b.jsonl.zst", size("data/one/b.jsonl.zst") / 2);
    let pattern = ["--pattern", first];
    // Cut, and no answer afterwards: the program ends.
    hub.set(|state| (state.cuts, state.then) = (1, Some(404)));
    let (code, _, stderr) = hub.prepare(dir, "out", &pattern);
    assert_eq!(code, 1);
    assert!(stderr.contains(&format!("cannot download `{first}` of `me/corpus`")), "{stderr}");
    assert!(!dir.join("out").exists());
    let from_half = format!("{first} from {half}");
    assert_eq!(downloads(&hub.requests()), [first, &from_half]);
    let blobs = dir.join("hf/hub/datasets--me--corpus/blobs");
    let names = || fs::read_dir(&blobs).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();
    assert!(names()[0].extension().is_some_and(|e| e == "incomplete"), "{:?}", names());

    // Killed in the middle of the second half.
    hub.set(|state| (state.cuts, state.then, state.stall) = (1, None, true));
    let mut command = hub.command(dir, "jsonl", &["--hub", "me/corpus", "--out"]);
    let mut child =
        command.arg(dir.join("out")).args(pattern).stderr(Stdio::null()).spawn().unwrap();
    let three_quarters = half + (size(first) - half) / 2;
    let there = |path: &Path| path.metadata().map_or(0, |m| m.len() as usize);
    while there(&names()[0]) < three_quarters {
        sleep(Duration::from_millis(20));
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was killed");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(downloads(&hub.requests()), [&from_half]);

    hub.set(|state| state.stall = false);
    let (code, _, stderr) = hub.prepare(dir, "out", &pattern);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(downloads(&hub.requests()), [format!("{first} from {three_quarters}")]);

    // Cut once: the same run goes on. What lay there and is no part of the file is noticed.
    fs::remove_dir_all(dir.join("hf")).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    let a = "data/one/a b.jsonl";
    let bytes = corpus().into_iter().find(|(p, _)| *p == a).unwrap().1;
    fs::write(blobs.join(etag(&bytes) + ".incomplete"), "something else").unwrap();
    hub.set(|state| state.cuts = 1);
    let (code, _, stderr) = hub.prepare(dir, "a", &["--pattern", a]);
    assert_eq!(code, 0, "{stderr}");
    let cut = 14 + (bytes.len() - 14) / 2;
    let from = |n: usize| format!("data/one/a%20b.jsonl from {n}");
    assert_eq!(downloads(&hub.requests()), [&from(14), &from(cut), "data/one/a%20b.jsonl"]);
    assert_eq!(fs::read(snapshot(dir).join(a)).unwrap(), bytes);
}

#[test]
fn a_preparation_goes_on_with_the_commit_that_it_began_with() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let zst = zstd::encode_all(&lines("b", 5000)[..], 3).unwrap();
    let damaged = zst[..zst.len() / 2].to_vec();
    let hub = Hub::new(&[("a.jsonl", lines("a", 10)), ("b.jsonl.zst", damaged)]);
    let (code, _, stderr) = hub.prepare(dir, "out", &[]);
    assert_eq!(code, 1);
    assert!(stderr.contains("b.jsonl.zst` after row "), "{stderr}");
    hub.requests();
    fs::write(snapshot(dir).join("b.jsonl.zst"), &zst).unwrap(); // what a second copy would give
    hub.set(|state| {
        state.lies.insert("b.jsonl.zst".into(), lfs("b.jsonl.zst", zst.len(), &etag(&zst)));
    });
    let (code, stdout, stderr) = hub.prepare(dir, "out", &[]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("continues   after 1 of 2 source files"), "{stderr}");
    let manifest: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((&manifest["commit"], &manifest["documents"]), (&json!(COMMIT), &json!(5010)));
    let requests = hub.requests();
    assert!(requests.iter().all(|request| !request.contains("/revision/")), "{requests:?}");
}

#[test]
fn a_token_opens_a_gated_dataset_and_goes_to_the_hub_alone() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let hub = Hub::new(&corpus());
    hub.set(|state| state.token = Some("secret"));
    let (code, _, stderr) = hub.prepare(dir, "out", &[]);
    assert_eq!(code, 1);
    assert!(stderr.contains("the Hub gives no access to `me/corpus`"), "{stderr}");
    assert!(stderr.contains("answered 401 (Access is restricted.)"), "{stderr}");
    assert!(stderr.contains("set `HF_TOKEN`, or log in with `hf auth login`"), "{stderr}");

    let mut wrong = hub.command(dir, "jsonl", &["--hub", "me/corpus", "--out"]);
    let (code, _, stderr) = run(wrong.arg(dir.join("out")).env("HF_TOKEN", "stale"));
    assert_eq!(code, 1);
    assert!(stderr.contains("accept the dataset's conditions at http://"), "{stderr}");
    assert!(stderr.contains("the token of `HF_TOKEN` must be valid"), "{stderr}");

    hub.requests();
    fs::create_dir_all(dir.join("hf")).unwrap();
    fs::write(dir.join("hf/token"), "secret\n").unwrap();
    let (code, _, stderr) = hub.prepare(dir, "out", &[]);
    assert_eq!(code, 0, "{stderr}");
    for request in hub.requests() {
        assert_eq!(
            request.ends_with(" with Bearer secret"),
            !request.starts_with("/cdn/"),
            "{request}"
        );
    }
}

#[test]
fn what_the_hub_does_not_have_is_told_with_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let hub = Hub::new(&corpus());
    let of = |more: &[&str]| {
        let mut command = hub.command(dir, "jsonl", more);
        run(command.arg("--out").arg(dir.join("out")))
    };
    for (code, more, wants) in [
        (1, &["--hub", "me/none"][..], &["has no dataset `me/none`", "check owner and name"][..]),
        (1, &["--hub", "me/corpus", "--revision", "v9"], &["no such revision", "`--revision`"]),
        (
            2,
            &["--hub", "me/corpus", "--pattern", "x/*.zst"],
            &[
                "no file of `me/corpus`, commit 0123",
                "matches `x/*.zst`",
                "among its files are `.git",
            ],
        ),
        (2, &["--hub", "corpus"], &["`corpus` is no name of a dataset", "OWNER/NAME"]),
        (2, &[], &["<--source <SOURCE>|--hub <OWNER/NAME>>"]),
        (2, &["--source", "x", "--hub", "me/corpus"], &["cannot be used with"]),
        (2, &["--source", "x", "--pattern", "y"], &["cannot be used with"]),
    ] {
        let (got, _, stderr) = of(more);
        assert_eq!(got, code, "{more:?}: {stderr}");
        wants.iter().for_each(|want| assert!(stderr.contains(want), "{want}: {stderr}"));
    }
    let mut gone = hub.command(dir, "jsonl", &["--hub", "me/corpus", "--out", "x"]);
    let (code, _, stderr) = run(gone.env("HF_ENDPOINT", "http://127.0.0.1:1"));
    assert_eq!(code, 1);
    assert!(stderr.contains("no answer from `http://127.0.0.1:1/api/"), "{stderr}");
    assert!(stderr.contains("name them with `--source`"), "{stderr}");
}

#[test]
fn files_that_are_not_what_the_hub_lists_are_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let hub = Hub::new(&corpus());
    let (path, bytes) = &corpus()[2];
    let outside = json!({ "type": "file", "path": "../x.jsonl", "size": 1, "oid": "a".repeat(40) });
    let name = json!({ "type": "file", "path": path, "size": 1, "oid": "../../x" });
    let huge = lfs(path, 1 << 60, &etag(bytes));
    let other = "b".repeat(64);
    for (lie, want) in [
        (outside, "got `../x.jsonl`".to_owned()),
        (name, "with `../../x`".into()),
        (lfs(path, bytes.len() + 1, &etag(bytes)), format!("got {}", bytes.len())),
        (lfs(path, bytes.len(), &other), format!("SHA-256 {other}, got {}", etag(bytes))),
        (huge, " TiB more, `".into()),
    ] {
        hub.set(|state| drop(state.lies.insert((*path).into(), lie)));
        let (code, _, stderr) = hub.prepare(dir, "out", &["--pattern", "data/one/*.jsonl"]);
        assert_eq!(code, 1, "{stderr}");
        assert!(stderr.contains(&want) && stderr.contains("hint: "), "{want}: {stderr}");
        assert!(!dir.join("out").exists() && !snapshot(dir).exists(), "{want}");
    }
    // Nothing of it is in the way of the right one.
    hub.set(|state| state.lies.clear());
    let (code, _, stderr) = hub.prepare(dir, "out", &["--pattern", "data/one/*.jsonl"]);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(&fs::read(snapshot(dir).join(path)).unwrap(), bytes);
}
