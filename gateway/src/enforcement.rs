//! The switch between enforcing and observing, per route and while the gateway runs: an escape hatch when events seem to be
//! refused wrongly.
//!
//! While a route observes, every verified event is delivered, except what the sidecar knows to be a forgery: a delivery id
//! that it has seen with another payload. The sidecar is asked and told as always, so that every event is in the right
//! state after switching back; what it would have refused is counted and logged.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use bytes::Bytes;
use clap::ValueEnum;
use http::{HeaderValue, Method, Response, StatusCode, Uri, header};
use oncegate_runtime::admin;
use serde_json::json;

use crate::{
    answer::{self, Body},
    route::Route,
};

/// The target of audit lines, which are logged whatever the log's level.
const AUDIT: &str = "oncegate_gateway::audit";

/// Whether the sidecar's decisions are carried out.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enforcement {
    /// An event is delivered only under a lock that the sidecar granted.
    Enforce,
    /// Every verified event is delivered, duplicates included; what would have been refused is counted and logged. A
    /// delivery that comes back with another body is still refused.
    Observe,
}

impl Enforcement {
    /// The name in the configuration and on the admin listener.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Observe => "observe",
        }
    }
}

/// Whether one route enforces now.
#[derive(Debug)]
pub(crate) struct Switch {
    observing: AtomicBool,
}

impl Switch {
    pub(crate) fn new(start: Enforcement) -> Self {
        Self { observing: AtomicBool::new(start == Enforcement::Observe) }
    }

    pub(crate) fn get(&self) -> Enforcement {
        if self.observing.load(Relaxed) { Enforcement::Observe } else { Enforcement::Enforce }
    }
}

impl Route {
    /// Switches the route from the next event on. `by` says in the log who asked for it.
    pub(crate) fn switch(&self, to: Enforcement, by: &'static str) {
        let before = self.enforcement.observing.swap(to == Enforcement::Observe, Relaxed);
        if before != (to == Enforcement::Observe) {
            tracing::warn!(
                target: AUDIT,
                path = &*self.path,
                tenant = self.tenant,
                provider = self.provider.name(),
                enforcement = to.name(),
                by,
                outcome = "done",
                "enforcement of a route was switched"
            );
        }
    }
}

/// `/enforcement` on the admin listener. GET shows every route. PUT with `?to=observe` or `?to=enforce` switches all of
/// them, or the one that `&path=` names; no browser sends a PUT to another site without asking first, and the listener
/// takes it only from this machine, unless told otherwise.
pub(crate) fn control(routes: Vec<Arc<Route>>) -> admin::Control {
    Arc::new(move |method: &Method, uri: &Uri| (uri.path() == PATH).then(|| answer(&routes, method, uri.query())))
}

const PATH: &str = "/enforcement";

fn answer(routes: &[Arc<Route>], method: &Method, query: Option<&str>) -> Response<Body> {
    match *method {
        Method::GET | Method::HEAD => page(routes),
        Method::PUT => match Wish::read(query.unwrap_or_default(), routes) {
            Ok(wish) => {
                for route in routes.iter().filter(|route| wish.path.is_none_or(|path| path == &*route.path)) {
                    route.switch(wish.to, "admin listener");
                }
                page(routes)
            }
            Err(problem) => answer::json(StatusCode::BAD_REQUEST, Bytes::from(json!({ "error": problem }).to_string())),
        },
        _ => {
            let mut refused =
                answer::json(StatusCode::METHOD_NOT_ALLOWED, Bytes::from_static(br#"{"error":"method not allowed"}"#));
            refused.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD, PUT"));
            refused
        }
    }
}

fn page(routes: &[Arc<Route>]) -> Response<Body> {
    let routes: Vec<_> = routes
        .iter()
        .map(|route| {
            json!({
                "path": &*route.path,
                "provider": route.provider.name(),
                "tenant": route.tenant,
                "enforcement": route.enforcement.get().name(),
            })
        })
        .collect();
    answer::json(StatusCode::OK, Bytes::from(json!({ "routes": routes }).to_string()))
}

/// What a PUT asks for.
struct Wish<'a> {
    to: Enforcement,
    path: Option<&'a str>,
}

impl<'a> Wish<'a> {
    fn read(query: &str, routes: &'a [Arc<Route>]) -> Result<Self, String> {
        let (mut to, mut path) = (None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match key {
                "to" => {
                    let parsed = Enforcement::from_str(value, false);
                    to = Some(parsed.map_err(|_| "to: permitted are enforce and observe".to_owned())?);
                }
                "path" => {
                    let wanted = decoded(value);
                    let known = routes.iter().map(|route| &*route.path).find(|known| wanted.as_deref() == Some(known));
                    let known = known.ok_or("path: no route has it; GET /enforcement shows those that there are")?;
                    path = Some(known);
                }
                _ => return Err("permitted are to and path".to_owned()),
            }
        }
        Ok(Self { to: to.ok_or("to: not given; enforce or observe")?, path })
    }
}

/// What a value of a query stands for: many clients write the slashes of a path as `%2F`. None where it stands for no text.
fn decoded(value: &str) -> Option<String> {
    let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
    let mut bytes = value.bytes();
    let mut text = Vec::with_capacity(value.len());
    while let Some(byte) = bytes.next() {
        let byte = if byte == b'%' { digit(bytes.next())? * 16 + digit(bytes.next())? } else { u32::from(byte) };
        text.push(u8::try_from(byte).ok()?);
    }
    String::from_utf8(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Options;

    #[test]
    fn one_route_is_switched_however_the_slashes_of_its_path_are_written() {
        let options = Options {
            upstream_url: Some("http://app/".into()),
            stripe_webhook_secret: Some("whsec_a".into()),
            paystack_webhook_secret: Some("sk_a".into()),
            ..Options::default()
        };
        let routes: Vec<_> = options.validate().unwrap().routes.into_iter().map(Arc::new).collect();
        let put = |query: &str| answer(&routes, &Method::PUT, Some(query)).status().as_u16();
        let stand = || [0, 1].map(|place: usize| routes[place].enforcement.get().name());
        for path in ["/webhooks/payments/stripe", "%2Fwebhooks%2Fpayments%2Fstripe", "%2fwebhooks/payments/%73tripe"] {
            assert_eq!(put(&format!("path={path}&to=observe")), 200, "{path}");
            assert_eq!(stand(), ["observe", "enforce"], "{path}");
            assert_eq!(put("to=enforce"), 200);
        }
        for path in ["", "%", "%2", "%2G", "%%2Fwebhooks", "%FF", "%2Fwebhooks%2Fpayments%2Fother", "webhooks"] {
            assert_eq!(put(&format!("to=observe&path={path}")), 400, "{path}");
        }
        assert_eq!(stand(), ["enforce", "enforce"]);
    }
}
