//! Requests that declare their length in two ways.

use std::sync::Arc;

use http::Request;
use hyper::service::Service;

use super::{scan::Framing, watched::Seen};

/// Extension of an HTTP/1 request that carries both `Transfer-Encoding` and `Content-Length`. hyper drops the latter
/// before a service sees it; behind a proxy that relies on the other one, the rest of the body becomes somebody's
/// next request. Refuse it and close the connection. Two different `Content-Length` are refused by hyper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AmbiguousFraming;

/// Marks such requests for the service within.
#[derive(Clone)]
pub(super) struct Framed<S> {
    service: S,
    seen: Arc<Seen>,
}

impl<S> Framed<S> {
    pub(super) fn new(service: S, seen: Arc<Seen>) -> Self {
        Self { service, seen }
    }
}

impl<S, B> Service<Request<B>> for Framed<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn call(&self, mut request: Request<B>) -> Self::Future {
        // Of several pipelined requests in one read, each has its own head there.
        if self.seen.next_head() != Some(Framing::of(request.headers())) {
            request.extensions_mut().insert(AmbiguousFraming);
        }
        self.service.call(request)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        convert::Infallible,
        io,
        pin::Pin,
        sync::Mutex,
        task::{Context, Poll},
        time::Duration,
    };

    use bytes::Bytes;
    use http::Response;
    use http_body_util::{BodyExt as _, Empty};
    use hyper::{body::Incoming, server::conn::http1, service::service_fn};
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

    use super::{super::watched::Watched, *};

    /// A peer whose bytes arrive in these pieces, and who keeps the connection open.
    struct Pieces(VecDeque<Vec<u8>>);

    impl AsyncRead for Pieces {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            let Some(piece) = self.0.pop_front() else { return Poll::Pending };
            buf.put_slice(&piece);
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Pieces {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// For each request in `pieces`, whether it was taken for ambiguous. The last one has to close the connection.
    async fn marked(pieces: impl Iterator<Item = &[u8]>) -> Vec<bool> {
        let found = Arc::new(Mutex::new(Vec::new()));
        let service = service_fn(|request: Request<Incoming>| {
            found.lock().unwrap().push(request.extensions().get::<AmbiguousFraming>().is_some());
            async {
                let _ = request.into_body().collect().await;
                Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
            }
        });
        let seen = Arc::new(Seen::default());
        let pieces = Pieces(pieces.filter(|piece| !piece.is_empty()).map(<[u8]>::to_vec).collect());
        let stream = Watched::http1(pieces, seen.clone());
        let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), Framed::new(service, seen));
        tokio::time::timeout(Duration::from_secs(10), connection).await.expect("the last request closes").unwrap();
        let found = found.lock().unwrap();
        found.clone()
    }

    async fn assert_marked(input: &str, wanted: &[bool]) {
        let input = input.as_bytes();
        for cut in 0..input.len() {
            let (before, after) = input.split_at(cut);
            assert_eq!(marked([before, after].into_iter()).await, wanted, "cut at {cut}");
        }
        assert_eq!(marked(input.chunks(1)).await, wanted, "byte by byte");
    }

    #[tokio::test]
    async fn what_a_stranger_wrote_into_a_body_says_nothing_about_the_next_request() {
        let body = "\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n";
        let size = body.len();
        assert_marked(
            &format!(
                "POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n\r\n{body}\
                 POST /nowhere HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n{size:x}\r\n{body}\r\n0\r\n\r\n\
                 POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
            ),
            &[false, false, false],
        )
        .await;
    }

    #[tokio::test]
    async fn a_request_with_both_lengths_is_marked_whatever_stands_before_it() {
        for lengths in
            ["content-length: 2\r\ntransfer-encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 2"]
        {
            for (before, headers) in [
                ("", 0),
                ("GET / HTTP/1.1\r\nhost: x\r\n\r\n", 1),
                ("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi", 1),
                ("POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nt: x\r\n\r\n", 1),
            ] {
                let mut wanted = vec![false; headers];
                wanted.push(true);
                let both =
                    format!("POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{lengths}\r\n\r\n2\r\nhi\r\n0\r\n\r\n");
                assert_marked(&format!("{before}{both}"), &wanted).await;
            }
        }
    }

    /// Numbers that are the same in each run.
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, end: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            usize::try_from(self.0 >> 33).unwrap() % end
        }

        fn one_of<'a>(&mut self, choices: &[&'a str]) -> &'a str {
            choices[self.below(choices.len())]
        }

        /// What somebody might send to be mistaken for a head.
        fn body(&mut self) -> String {
            let texts = [
                "\n",
                "\r\n",
                "content-length: 5",
                "Transfer-Encoding: chunked",
                "0\r\n\r\n",
                "GET / HTTP/1.1",
                "x",
                "",
            ];
            (0..self.below(6)).map(|_| self.one_of(&texts)).collect()
        }

        /// A request in one of the forms that hyper accepts, and whether it declares its length in two ways.
        fn request(&mut self, headers: &str) -> (String, bool) {
            let end = self.one_of(&["\r\n", "\r\n", "\n"]);
            let length = self.one_of(&["content-length:", "Content-Length: ", "CONTENT-LENGTH:\t "]);
            let chunked = self.one_of(&[
                "transfer-encoding: chunked",
                "Transfer-Encoding:chunked ",
                "TRANSFER-ENCODING: gzip, chunked",
            ]);
            let body = self.body();
            let mut chunks = String::new();
            let extension = self.one_of(&["", ";a=b", " ; content-length: 3", "\t"]);
            for chunk in [body.as_str(), "tail"].into_iter().filter(|chunk| !chunk.is_empty()) {
                let zeros = self.one_of(&["", "0", "000"]);
                let size = chunk.len();
                chunks += &if self.below(2) == 0 { format!("{zeros}{size:x}") } else { format!("{zeros}{size:X}") };
                chunks += &format!("{extension}\r\n{chunk}\r\n");
            }
            chunks += self.one_of(&["0\r\n\r\n", "0;x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"]);
            let size = body.len();
            let (lengths, body, both) = match self.below(5) {
                0 => (String::new(), String::new(), false),
                1 => (format!("{length}{size} {end}"), body, false),
                2 => (format!("{chunked}{end}"), chunks, false),
                3 => (format!("{chunked}{end}x: y{end}{length}{size}{end}"), chunks, true),
                _ => (format!("{length}{size}{end}{chunked}{end}"), chunks, true),
            };
            let before = self.one_of(&["", "", "\r\n", "\n"]);
            (format!("{before}POST /content-length:1 HTTP/1.1{end}host: x{end}{headers}{lengths}{end}{body}"), both)
        }
    }

    #[tokio::test]
    async fn exactly_the_requests_with_both_lengths_are_marked_in_whatever_form_and_pieces() {
        let mut numbers = Numbers(0x5eed);
        for case in 0..2_000 {
            let count = 1 + numbers.below(4);
            let (requests, wanted): (Vec<String>, Vec<bool>) = (1..=count)
                .map(|number| numbers.request(if number == count { "connection: close\r\n" } else { "" }))
                .unzip();
            // hyper itself does not continue after any of these.
            let served = wanted.iter().position(|both| *both).map_or(count, |place| place + 1);
            let input = requests.concat();
            let mut pieces = Vec::new();
            let mut rest = input.as_bytes();
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(rest.len().min(1 + numbers.below(90)));
                pieces.push(piece);
                rest = after;
            }
            assert_eq!(marked(pieces.into_iter()).await, wanted[..served], "case {case}: {input:?}");
        }
    }
}
