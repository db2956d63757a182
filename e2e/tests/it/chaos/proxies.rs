//! The proxies do what they are told.

use std::{
    io::ErrorKind,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::Result;
use oncegate_e2e::proxy::{Direction, Link, Proxy};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::timeout,
};

/// Sends back what it gets, and ends when the far side has.
async fn echo() -> Result<std::net::SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                // An end of either kind is what the tests look for on the near side.
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
    });
    Ok(address)
}

async fn round_trip(stream: &mut TcpStream, text: &[u8]) -> std::io::Result<()> {
    stream.write_all(text).await?;
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back).await?;
    assert_eq!(back, text);
    Ok(())
}

const SHORT: Duration = Duration::from_millis(200);

#[tokio::test]
async fn a_proxy_delays_stalls_throttles_and_recovers() -> Result<()> {
    let proxy = Proxy::start(echo().await?).await?;
    let mut stream = TcpStream::connect(proxy.address()).await?;
    round_trip(&mut stream, b"up").await?;

    proxy.set(Link::Delay(SHORT));
    let began = Instant::now();
    round_trip(&mut stream, b"late").await?;
    assert!(began.elapsed() >= SHORT * 2, "both ways");

    for link in [Link::Stall, Link::StallOne(Direction::Request), Link::StallOne(Direction::Reply)] {
        proxy.set(link);
        stream.write_all(b"x").await?;
        let mut back = [0];
        assert!(timeout(SHORT, stream.read_exact(&mut back)).await.is_err(), "{link:?} says nothing");
        proxy.set(Link::Up);
        stream.read_exact(&mut back).await?;
    }

    proxy.set(Link::Throttle(100));
    let began = Instant::now();
    round_trip(&mut stream, &[7; 50]).await?;
    assert!(began.elapsed() >= SHORT, "50 bytes at 100 a second");
    assert_eq!(proxy.connections(), 1);
    Ok(())
}

#[tokio::test]
async fn a_proxy_silences_the_connection_that_is_named_and_no_other() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let proxy = Proxy::start(listener.local_addr()?).await?;
    let connect = async || -> Result<_> {
        let near = TcpStream::connect(proxy.address()).await?;
        let (far, seen) = listener.accept().await?;
        Ok((near, far, seen.port()))
    };
    let (mut near, mut far, port) = connect().await?;
    let (mut other_near, mut other_far, _) = connect().await?;
    let mut buffer = [0];
    near.write_all(b"x").await?;
    far.read_exact(&mut buffer).await?;

    proxy.silence(port);
    near.write_all(b"x").await?;
    far.write_all(b"x").await?;
    assert!(timeout(SHORT, far.read(&mut buffer)).await.is_err(), "no request");
    assert!(timeout(SHORT, near.read(&mut buffer)).await.is_err(), "no reply, and no end");
    other_near.write_all(b"x").await?;
    other_far.read_exact(&mut buffer).await?;
    let (mut near, mut far, _) = connect().await?;
    far.write_all(b"x").await?;
    near.read_exact(&mut buffer).await?;
    Ok(())
}

#[tokio::test]
async fn a_proxy_cuts_resets_refuses_and_half_closes() -> Result<()> {
    let proxy = Proxy::start(echo().await?).await?;
    let reset = |result: std::io::Result<usize>| {
        assert!(
            result.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset),
            "a reset, not an orderly end: {result:?}"
        );
    };
    let mut buffer = [0; 64];

    for direction in [Direction::Request, Direction::Reply] {
        proxy.set(Link::CutAfter(direction, 3));
        let mut stream = TcpStream::connect(proxy.address()).await?;
        stream.write_all(b"123").await?;
        let mut back = [0; 3];
        if direction == Direction::Reply {
            // All that is let through may be gone again with the reset.
            let _ = stream.read_exact(&mut back).await;
        }
        let mut result = stream.read(&mut buffer).await;
        if matches!(result, Ok(count) if count > 0) {
            result = stream.read(&mut buffer).await;
        }
        reset(result);
    }

    proxy.set(Link::Up);
    let mut stream = TcpStream::connect(proxy.address()).await?;
    round_trip(&mut stream, b"up").await?;
    proxy.reset();
    reset(stream.read(&mut buffer).await);
    let mut stream = TcpStream::connect(proxy.address()).await?;
    round_trip(&mut stream, b"up").await?;
    proxy.close();
    assert_eq!(stream.read(&mut buffer).await?, 0, "an orderly end");

    proxy.set(Link::Refuse);
    let mut stream = TcpStream::connect(proxy.address()).await?;
    reset(stream.read(&mut buffer).await);

    proxy.set(Link::Up);
    let mut stream = TcpStream::connect(proxy.address()).await?;
    round_trip(&mut stream, b"up").await?;
    // The near side is told that the far one has finished, and can still send.
    proxy.set(Link::HalfClose(Direction::Reply));
    assert_eq!(stream.read(&mut buffer).await?, 0);
    stream.write_all(b"still").await?;

    let other = echo().await?;
    proxy.set(Link::Up);
    proxy.set_target(other);
    let mut stream = TcpStream::connect(proxy.address()).await?;
    round_trip(&mut stream, b"elsewhere").await?;
    Ok(())
}
