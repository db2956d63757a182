//! A real Prometheus, and its promtool.

use std::{
    env, fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt as _, process::Command, time::Instant};

use crate::{
    eventually::DEADLINE,
    http_client::{self, Answer},
    postgres::free_port,
    supervised::{Directory, Supervised},
};

const HOW_TO_INSTALL: &str = "was not found in PATH. Install Prometheus (Debian: apt-get install prometheus; Fedora: dnf \
     install golang-github-prometheus; macOS: brew install prometheus), or run scripts/test, which installs it";

/// A server that scrapes, with the rules of the repository.
#[derive(Debug)]
pub struct Prometheus {
    address: SocketAddr,
    _server: Supervised,
    // Last, so that it is removed after the server has ended.
    _directory: Directory,
}

impl Prometheus {
    /// Starts a server that scrapes each target, by job, several times a second.
    pub async fn start(targets: &[(&str, SocketAddr)], rules: &Path) -> Result<Self> {
        let job = |(job, target): &(&str, SocketAddr)| json!({ "job_name": job, "static_configs": [{ "targets": [target] }] });
        Self::start_with(&targets.iter().map(job).collect(), rules).await
    }

    /// The same with a list of scrape configurations.
    pub async fn start_with(scrape_configs: &Value, rules: &Path) -> Result<Self> {
        let directory = Directory::new("oncegate-prometheus-")?;
        // JSON is YAML.
        let config = json!({
            "global": { "scrape_interval": "200ms", "evaluation_interval": "200ms" },
            "rule_files": [rules],
            "scrape_configs": scrape_configs,
        });
        let file = directory.path().join("prometheus.yml");
        fs::write(&file, config.to_string())?;
        let program = find_program("prometheus")?;
        let end = Instant::now() + DEADLINE;
        loop {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
            match start(&program, &file, &directory, address).await {
                Ok(server) => return Ok(Self { address, _server: server, _directory: directory }),
                // Another process may have taken the port.
                Err(_) if Instant::now() < end => tokio::time::sleep(Duration::from_millis(100)).await,
                Err(error) => return Err(error),
            }
        }
    }

    /// The result of an instant query: `data.result` of the answer.
    pub async fn query(&self, query: &str) -> Result<Value> {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let answer = http_client::get(self.address, &format!("/api/v1/query?query={encoded}")).await?;
        Ok(data(query, &answer)?["result"].clone())
    }

    /// The value of the first series of a query, if there is one.
    pub async fn value(&self, query: &str) -> Result<Option<f64>> {
        let result = self.query(query).await?;
        Ok(result[0]["value"][1].as_str().and_then(|value| value.parse().ok()))
    }

    /// The result of a path of the server's API: `data` of the answer.
    pub async fn get(&self, path: &str) -> Result<Value> {
        data(path, &http_client::get(self.address, path).await?)
    }
}

/// `data` of an answer. One that is refused has none, which must not look as if nothing had been found.
fn data(asked: &str, answer: &Answer) -> Result<Value> {
    let json = answer.json();
    ensure!(
        answer.status == 200 && json["status"] == "success",
        "Prometheus was asked {asked} and answered {}: {}",
        answer.status,
        String::from_utf8_lossy(&answer.body)
    );
    Ok(json["data"].clone())
}

async fn start(program: &Path, config: &Path, directory: &Directory, address: SocketAddr) -> Result<Supervised> {
    let log = directory.path().join("log");
    let command = [
        program.display().to_string(),
        format!("--config.file={}", config.display()),
        format!("--storage.tsdb.path={}", directory.path().join("data").display()),
        format!("--web.listen-address={address}"),
    ];
    let mut server = Supervised::start(&command, directory, &log, "KILL", None)?;
    let end = Instant::now() + DEADLINE;
    loop {
        if http_client::get(address, "/-/ready").await.is_ok_and(|answer| answer.status == 200) {
            return Ok(server);
        }
        if server.has_exited() || Instant::now() >= end {
            bail!("Prometheus did not start:\n{}", fs::read_to_string(log).unwrap_or_default());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Runs promtool on some input; on failure, reports what it wrote.
pub async fn promtool(directory: &Path, arguments: &[&str], input: &str) -> Result<()> {
    let mut tool = Command::new(find_program("promtool")?)
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("cannot start promtool")?;
    let mut stdin = tool.stdin.take().context("standard input was not piped")?;
    stdin.write_all(input.as_bytes()).await?;
    drop(stdin);
    let output = tool.wait_with_output().await?;
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    ensure!(output.status.success(), "promtool {arguments:?}: {said}");
    Ok(())
}

fn find_program(name: &str) -> Result<PathBuf> {
    let mut directories: Vec<PathBuf> = env::var_os("PATH").iter().flat_map(env::split_paths).collect();
    directories.extend(["/opt/homebrew/bin", "/usr/local/bin"].map(PathBuf::from));
    let found = directories.iter().map(|directory| directory.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} {HOW_TO_INSTALL}"))
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, StatusCode};

    use super::*;

    #[test]
    fn only_an_answer_that_says_success_has_data() {
        let answer = |status, body: &'static str| {
            let status = StatusCode::from_u16(status).unwrap();
            data("sum(up", &Answer { status, headers: HeaderMap::new(), body: body.into() })
        };
        let found = answer(200, r#"{"status":"success","data":{"result":[]}}"#).unwrap();
        assert_eq!(found, json!({ "result": [] }));
        for (status, body) in [
            (400, r#"{"status":"error","errorType":"bad_data","error":"parse error: unclosed left parenthesis"}"#),
            (503, "Service Unavailable"),
            (503, r#"{"status":"success","data":{"result":[]}}"#),
            (200, r#"{"status":"error","error":"of another kind"}"#),
        ] {
            let error = answer(status, body).unwrap_err().to_string();
            assert!(error.contains("sum(up") && error.contains(body), "{error}");
        }
    }
}
