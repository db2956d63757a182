//! A server that speaks Redis's protocol, and answers every command that reads or writes with one error.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Context as _, Result, bail};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
};

/// See the module. Ends when dropped.
pub(crate) struct FakeRedis {
    address: SocketAddr,
    refused: Arc<AtomicUsize>,
    server: JoinHandle<()>,
}

impl FakeRedis {
    /// Answers with this error; `{address}` in it becomes its own.
    pub(crate) async fn start(error: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let error = error.replace("{address}", &address.to_string());
        let refused = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&refused);
        let server = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (error, counted) = (error.clone(), Arc::clone(&counted));
                connections.spawn(async move { serve(stream, &error, &counted).await });
            }
        });
        Ok(Self { address, refused, server })
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    /// Commands that got the error so far.
    pub(crate) fn refused(&self) -> usize {
        self.refused.load(Ordering::Relaxed)
    }
}

impl Drop for FakeRedis {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn serve(stream: TcpStream, error: &str, refused: &AtomicUsize) -> Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let command = read_command(&mut stream).await?;
        let answer = match command.first().map(|name| name.to_ascii_uppercase()).as_deref() {
            Some("CLIENT") if command.get(1).is_some_and(|name| name.eq_ignore_ascii_case("ID")) => ":1\r\n".to_owned(),
            Some("CLIENT" | "SELECT") => "+OK\r\n".to_owned(),
            Some("PING") => "+PONG\r\n".to_owned(),
            Some("INFO") => "$21\r\nredis_version:7.0.0\r\n\r\n".to_owned(),
            Some(_) => {
                refused.fetch_add(1, Ordering::Relaxed);
                format!("-{error}\r\n")
            }
            None => bail!("an empty command"),
        };
        stream.write_all(answer.as_bytes()).await?;
    }
}

async fn read_command(stream: &mut BufReader<TcpStream>) -> Result<Vec<String>> {
    let parts = read_number(stream, '*').await?;
    let mut command = Vec::new();
    for _ in 0..parts {
        let length = read_number(stream, '$').await?;
        let mut part = vec![0; length + 2];
        stream.read_exact(&mut part).await?;
        command.push(String::from_utf8_lossy(&part[..length]).into_owned());
    }
    Ok(command)
}

async fn read_number(stream: &mut BufReader<TcpStream>, sign: char) -> Result<usize> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        bail!("closed");
    }
    line.trim_end().strip_prefix(sign).context("not what was expected")?.parse().context("no number")
}
