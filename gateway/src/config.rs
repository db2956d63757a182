//! The gateway's settings: parsed by clap, checked as a whole, all problems reported at once.

mod check;
mod file;
mod routes;

use std::{net::SocketAddr, num::NonZeroUsize, path::PathBuf, sync::Arc, time::Duration};

use clap::{
    ArgMatches, Args as _, Command, FromArgMatches as _, ValueEnum,
    builder::{BoolishValueParser, Resettable},
};
use oncegate_runtime::{
    config::{Problems, byte_size, duration},
    secret::{SecretText, file as secret_file},
    tls::ServerTls,
};

pub use crate::enforcement::Enforcement;
pub use crate::providers::{flutterwave::Version as FlutterwaveVersion, paypal::Environment};
use crate::{failures::FailureLimits, route::Route, sidecar::Reach};

/// Where a sidecar is, unless something else is said.
pub const SIDECAR_URL_DEFAULT: &str = "http://127.0.0.1:50051";

/// What the operator may set. The texts are the manual (`--help`).
#[derive(clap::Args, Clone, Debug)]
// A process may take the options of both services: the groups that clap names after the types would clash.
#[group(skip)]
#[command(next_help_heading = "Gateway")]
pub struct Options {
    /// Address and port of the public HTTP listener
    ///
    /// Loopback by default, so that exposing it is a decision.
    #[arg(long, env = "GATEWAY_LISTEN", value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    pub gateway_listen: SocketAddr,

    /// The public listener's certificate in PEM, its own first and the intermediates behind it: TLS is spoken, and nothing else
    ///
    /// For a gateway with no proxy in front that ends TLS. Read again when it changes.
    #[arg(long, env = "GATEWAY_TLS_CERT_FILE", value_name = "FILE", value_parser = secret_file)]
    pub gateway_tls_cert_file: Option<PathBuf>,

    /// The private key of the public listener's certificate, in PEM
    #[arg(long, env = "GATEWAY_TLS_KEY_FILE", value_name = "FILE", value_parser = secret_file)]
    pub gateway_tls_key_file: Option<PathBuf>,

    /// The sidecar, as http://host:port, https://host:port or unix:/path/of/a.sock; several separated by commas
    ///
    /// Loopback by default: a sidecar in the gateway's own pod. All addresses that a name has (a headless Service in
    /// Kubernetes) get their share of the calls. Not used in `oncegate all`, whose gateway calls the sidecar in its own
    /// process, and neither are the other settings of the way to a sidecar.
    #[arg(long, env = "SIDECAR_URL", value_name = "URL", default_value = SIDECAR_URL_DEFAULT)]
    pub sidecar_url: String,

    /// The authorities that the sidecar's certificate has to lead to, in PEM; by default the system's
    ///
    /// For https:// in SIDECAR_URL. Read again when it changes, as are the other files for TLS.
    #[arg(long, env = "SIDECAR_CA_FILE", value_name = "FILE", value_parser = secret_file)]
    pub sidecar_ca_file: Option<PathBuf>,

    /// The gateway's own certificate in PEM, where the sidecar asks for one
    #[arg(long, env = "SIDECAR_CLIENT_CERT_FILE", value_name = "FILE", value_parser = secret_file)]
    pub sidecar_client_cert_file: Option<PathBuf>,

    /// The private key of the gateway's certificate, in PEM
    #[arg(long, env = "SIDECAR_CLIENT_KEY_FILE", value_name = "FILE", value_parser = secret_file)]
    pub sidecar_client_key_file: Option<PathBuf>,

    /// The token that the sidecar knows the gateway by
    #[arg(long, env = "SIDECAR_TOKEN", value_name = "TOKEN", hide_env_values = true)]
    pub sidecar_token: Option<SecretText>,

    /// A file with the token, read again when it changes
    #[arg(long, env = "SIDECAR_TOKEN_FILE", value_name = "FILE", value_parser = secret_file)]
    pub sidecar_token_file: Option<PathBuf>,

    /// Permits to send the token without TLS to a sidecar on another machine
    #[arg(long, env = "SIDECAR_INSECURE", value_parser = BoolishValueParser::new())]
    pub sidecar_insecure: bool,

    /// How often the name of the sidecar is resolved again
    ///
    /// When that fails, the known addresses stay. When an address fails it is resolved at once, but at most once a second.
    #[arg(long, env = "SIDECAR_RESOLVE_INTERVAL", value_name = "DURATION", default_value = "15s", value_parser = duration)]
    pub sidecar_resolve_interval: Duration,

    /// A file in TOML with routes of their own: `[[route]]` with provider, secrets, application and policies
    ///
    /// Any number, in addition to those that the settings here make. What a route does not say is taken from the settings
    /// here.
    #[arg(long, env = "ONCEGATE_CONFIG", value_name = "FILE", value_parser = secret_file)]
    pub config: Option<PathBuf>,

    /// The application that events are delivered to, as http(s)://host:port/path. Required
    #[arg(long, env = "UPSTREAM_URL", value_name = "URL")]
    pub upstream_url: Option<String>,

    /// Stripe's signing secret (whsec_...), several separated by commas while one is replaced
    ///
    /// A provider without a secret has no route. Each endpoint, and each of test and live mode, has its own.
    #[arg(long, env = "STRIPE_WEBHOOK_SECRET", value_name = "SECRET", hide_env_values = true)]
    pub stripe_webhook_secret: Option<SecretText>,

    /// A file with Stripe's signing secrets, read again when it changes
    #[arg(long, env = "STRIPE_WEBHOOK_SECRET_FILE", value_name = "FILE", value_parser = secret_file)]
    pub stripe_webhook_secret_file: Option<PathBuf>,

    /// How old, or how far in the future, Stripe's signature may be, at most 15m
    ///
    /// 5 minutes is what Stripe's own libraries permit. A retry is signed anew, so a tight limit costs no event.
    #[arg(long, env = "STRIPE_TOLERANCE", value_name = "DURATION", default_value = "300s", value_parser = duration)]
    pub stripe_tolerance: Duration,

    /// The id of PayPal's webhook, several separated by commas while one is replaced
    ///
    /// Shown beside the webhook in PayPal's developer dashboard. It is part of what PayPal signs.
    #[arg(long, env = "PAYPAL_WEBHOOK_ID", value_name = "ID", hide_env_values = true)]
    pub paypal_webhook_id: Option<SecretText>,

    /// A file with the ids of PayPal's webhooks, read again when it changes
    #[arg(long, env = "PAYPAL_WEBHOOK_ID_FILE", value_name = "FILE", value_parser = secret_file)]
    pub paypal_webhook_id_file: Option<PathBuf>,

    /// PayPal's environment; an endpoint of one takes no events of the other
    #[arg(long, env = "PAYPAL_ENVIRONMENT", value_name = "NAME", default_value = "live")]
    pub paypal_environment: Environment,

    /// A directory with PayPal's certificates instead of fetching them, for clusters without egress
    ///
    /// PEM files named like the last part of the certificate's URL (CERT-...), with or without .pem; the intermediate
    /// behind the leaf. Nothing is fetched then.
    #[arg(long, env = "PAYPAL_CERT_DIR", value_name = "DIRECTORY", value_parser = secret_file)]
    pub paypal_cert_dir: Option<PathBuf>,

    /// Roots in PEM that PayPal's certificates have to lead to, instead of the public ones
    #[arg(long, env = "PAYPAL_TRUST_ANCHORS_FILE", value_name = "FILE", value_parser = secret_file)]
    pub paypal_trust_anchors_file: Option<PathBuf>,

    /// Intermediate certificates in PEM between PayPal's and the roots, where the certificate comes alone
    #[arg(long, env = "PAYPAL_INTERMEDIATES_FILE", value_name = "FILE", value_parser = secret_file)]
    pub paypal_intermediates_file: Option<PathBuf>,

    /// How old PayPal's signature may be; no limit by default
    ///
    /// 1s to 30 days. PayPal tries for three days and does not say whether it signs anew for each try: a tight limit may lose
    /// events.
    #[arg(long, env = "PAYPAL_TOLERANCE", value_name = "DURATION", value_parser = duration)]
    pub paypal_tolerance: Option<Duration>,

    /// Flutterwave's secret hash, several separated by commas while one is replaced
    #[arg(long, env = "FLUTTERWAVE_WEBHOOK_SECRET", value_name = "SECRET", hide_env_values = true)]
    pub flutterwave_webhook_secret: Option<SecretText>,

    /// A file with Flutterwave's secret hashes, read again when it changes
    #[arg(long, env = "FLUTTERWAVE_WEBHOOK_SECRET_FILE", value_name = "FILE", value_parser = secret_file)]
    pub flutterwave_webhook_secret_file: Option<PathBuf>,

    /// What Flutterwave sends: v4 signs the body; v3 repeats the secret, which proves nothing about the body (weak)
    ///
    /// Has no default: to guess wrong is to refuse every event, or to accept forged ones.
    #[arg(long, env = "FLUTTERWAVE_SIGNATURE", value_name = "VERSION")]
    pub flutterwave_signature: Option<FlutterwaveVersion>,

    /// Paystack's API secret key (sk_...), several separated by commas while one is replaced
    ///
    /// Paystack has no secret for webhooks alone. Test and live mode have keys of their own, which one list may not mix: test
    /// events would pass for payments with the same reference.
    #[arg(long, env = "PAYSTACK_WEBHOOK_SECRET", value_name = "SECRET", hide_env_values = true)]
    pub paystack_webhook_secret: Option<SecretText>,

    /// A file with Paystack's API secret keys, read again when it changes
    #[arg(long, env = "PAYSTACK_WEBHOOK_SECRET_FILE", value_name = "FILE", value_parser = secret_file)]
    pub paystack_webhook_secret_file: Option<PathBuf>,

    /// Signs what is delivered, so that the application can tell the gateway from others
    ///
    /// Standard Webhooks: base64, with or without whsec_; several separated by commas while one is replaced. Adds
    /// the headers webhook-id, webhook-timestamp and webhook-signature.
    #[arg(long, env = "UPSTREAM_SECRET", value_name = "SECRET", hide_env_values = true)]
    pub upstream_secret: Option<SecretText>,

    /// A file with the secrets that sign what is delivered, read again when it changes
    #[arg(long, env = "UPSTREAM_SECRET_FILE", value_name = "FILE", value_parser = secret_file)]
    pub upstream_secret_file: Option<PathBuf>,

    /// The tenant of all events: separates customers, or live from test mode
    #[arg(long, env = "GATEWAY_TENANT", value_name = "NAME", default_value = "default")]
    pub gateway_tenant: String,

    /// The name of this instance, kept with each lock for people to see
    ///
    /// Kubernetes and Docker set HOSTNAME to the name of the pod or container.
    #[arg(long, env = "HOSTNAME", value_name = "NAME", default_value = "gateway")]
    pub gateway_holder: String,

    /// The answer to a duplicate whose first delivery is still under way after the wait: 409 or 200
    ///
    /// 409 makes the provider ask again. With 200 the payment is lost when that first delivery then fails.
    #[arg(long, env = "GATEWAY_IN_PROGRESS_STATUS", value_name = "STATUS", default_value = "409")]
    pub gateway_in_progress_status: InProgressStatus,

    /// The answer to an event that is held for a person (dead or unknown): 422 or 200
    ///
    /// 422 keeps it in the provider's list of failures; 200 ends the provider's retries.
    #[arg(long, env = "GATEWAY_HELD_STATUS", value_name = "STATUS", default_value = "422")]
    pub gateway_held_status: HeldStatus,

    /// Whether the sidecar's decisions are carried out (enforce), or only counted and logged while every verified event is
    /// delivered (observe)
    ///
    /// An escape hatch when events seem to be refused wrongly: duplicates are then delivered, but never a delivery that
    /// comes back with another body. Can be switched while the gateway runs, for each route, by the file of ONCEGATE_CONFIG
    /// and on the admin listener.
    #[arg(long, env = "GATEWAY_ENFORCEMENT", value_name = "KIND", default_value = "enforce")]
    pub gateway_enforcement: Enforcement,

    /// What a 3xx, or a 4xx other than 408, 425 and 429, from the application means
    ///
    /// retryable: a wrong deployment loses nothing. terminal: the event is dead until a person decides.
    #[arg(long, env = "UPSTREAM_REFUSAL", value_name = "KIND", default_value = "retryable")]
    pub upstream_refusal: OnRefusal,

    /// What a time-out of the application, or a connection lost after the request was sent, means
    ///
    /// retryable: the next attempt has a higher fencing token, which guards the effect. unknown: the event is held
    /// until a person decides, for applications that look at neither token nor event id.
    #[arg(long, env = "UPSTREAM_UNCLEAR", value_name = "KIND", default_value = "retryable")]
    pub upstream_unclear: OnUnclear,

    /// How long the application may take to answer
    ///
    /// Less than the lock by the margin, so that no second attempt starts while this one may still be at work.
    #[arg(long, env = "UPSTREAM_TIMEOUT", value_name = "DURATION", default_value = "240s", value_parser = duration)]
    pub upstream_timeout: Duration,

    /// How long connecting to the application may take, TLS included
    ///
    /// Of a name with several addresses each has its part of it. An attempt that fails here has had no effect, and may be
    /// repeated at once, by the provider's next try.
    #[arg(long, env = "UPSTREAM_CONNECT_TIMEOUT", value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub upstream_connect_timeout: Duration,

    /// How long an idle connection to the application is kept
    ///
    /// Shorter than the keep-alive time of the application (5 s is a common default), which otherwise closes a
    /// connection just as it is used again.
    #[arg(long, env = "UPSTREAM_IDLE_TIMEOUT", value_name = "DURATION", default_value = "4s", value_parser = duration)]
    pub upstream_idle_timeout: Duration,

    /// How much of the application's answer is read
    ///
    /// The status line decides; the rest is read only so that the connection can be used again.
    #[arg(long, env = "UPSTREAM_BODY_BYTES_MAX", value_name = "SIZE", default_value = "64KiB", value_parser = byte_size)]
    pub upstream_body_bytes_max: u64,

    /// How long reading the application's answer may take after its status line
    #[arg(long, env = "UPSTREAM_BODY_TIMEOUT", value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub upstream_body_timeout: Duration,

    /// How long the lock on an event lasts, 1s to 24h
    ///
    /// When a gateway dies, its events wait for this long. Has to cover the application's time-out and the margin.
    #[arg(long, env = "GATEWAY_LOCK_DURATION", value_name = "DURATION", default_value = "300s", value_parser = duration)]
    pub gateway_lock_duration: Duration,

    /// What has to be left of the lock when the application's time-out is over
    ///
    /// One half covers the calls to the sidecar before the delivery, the other is kept for the mark after it and for pauses
    /// of the process. A sidecar too slow for the first half costs the application time: a delivery ends before its lock.
    #[arg(long, env = "GATEWAY_LOCK_MARGIN", value_name = "DURATION", default_value = "15s", value_parser = duration)]
    pub gateway_lock_margin: Duration,

    /// How long a duplicate waits for the outcome of the running attempt, at most 30s; 0s not to wait
    #[arg(long, env = "GATEWAY_WAIT_DURATION", value_name = "DURATION", default_value = "10s", value_parser = duration)]
    pub gateway_wait_duration: Duration,

    /// How long the provider waits for an answer at most; the delivery goes on without it
    ///
    /// Below the time-outs of the providers (30 s and more). The provider's retry then finds the event done.
    #[arg(long, env = "GATEWAY_ANSWER_TIMEOUT", value_name = "DURATION", default_value = "20s", value_parser = duration)]
    pub gateway_answer_timeout: Duration,

    /// How long a call to the sidecar may take, beyond the wait that it asks for
    ///
    /// More than twice the sidecar's longest statement (1 s, which is no setting): a call may have to wait for the batch before
    /// its own. Nothing enforces that, not even in one process: with less, calls are repeated that a slow database would have
    /// answered, and nothing is lost.
    #[arg(long, env = "SIDECAR_TIMEOUT", value_name = "DURATION", default_value = "2500ms", value_parser = duration)]
    pub sidecar_timeout: Duration,

    /// How long connecting to the sidecar may take
    #[arg(long, env = "SIDECAR_CONNECT_TIMEOUT", value_name = "DURATION", default_value = "1s", value_parser = duration)]
    pub sidecar_connect_timeout: Duration,

    /// The largest body of a webhook
    ///
    /// Providers stay far below it (20 kB is typical).
    #[arg(long, env = "GATEWAY_BODY_BYTES_MAX", value_name = "SIZE", default_value = "256KiB", value_parser = byte_size)]
    pub gateway_body_bytes_max: u64,

    /// The bytes of all bodies held at once; beyond it requests get 503
    ///
    /// The pod's memory limit has to be larger. Of bodies that are not verified yet one source has a quarter at most, and the
    /// largest body at least, wherever sources are told apart (GATEWAY_TRUSTED_HOPS, GATEWAY_CONNECTIONS_PER_ADDRESS).
    #[arg(long, env = "GATEWAY_BODY_BUDGET", value_name = "SIZE", default_value = "64MiB", value_parser = byte_size)]
    pub gateway_body_budget: u64,

    /// How long a whole body may take to arrive
    #[arg(long, env = "GATEWAY_BODY_TIMEOUT", value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub gateway_body_timeout: Duration,

    /// How long the first byte of a body may take to arrive
    #[arg(long, env = "GATEWAY_BODY_FIRST_BYTE_TIMEOUT", value_name = "DURATION", default_value = "2s", value_parser = duration)]
    pub gateway_body_first_byte_timeout: Duration,

    /// How long a connection may take to send a request's head, or to send the next request
    ///
    /// Behind a proxy that keeps idle connections, longer than it keeps them (60 s in ingress-nginx and in AWS' balancers by
    /// default): otherwise a webhook may be sent just as the connection is closed here, and the provider gets a 502.
    #[arg(long, env = "GATEWAY_HEADER_TIMEOUT", value_name = "DURATION", default_value = "30s", value_parser = duration)]
    pub gateway_header_timeout: Duration,

    /// How long a new connection may say nothing
    #[arg(long, env = "GATEWAY_FIRST_BYTE_TIMEOUT", value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub gateway_first_byte_timeout: Duration,

    /// Connections open at once; beyond it new ones wait
    #[arg(long, env = "GATEWAY_CONNECTIONS_MAX", value_name = "NUMBER", default_value_t = 4_096)]
    pub gateway_connections_max: usize,

    /// How many of them one address may have; beyond it new ones are closed. 0: no limit; by default a quarter of all
    ///
    /// An IPv4 address, or the first 64 bits of an IPv6 address. By default there is no limit behind proxies of your own
    /// (GATEWAY_TRUSTED_HOPS), whose address everybody has, and never one for this machine. 0 where a balancer without
    /// X-Forwarded-For hides who connects: there, without GATEWAY_TRUSTED_HOPS, no source is held to a quarter of
    /// GATEWAY_BODY_BUDGET either.
    #[arg(long, env = "GATEWAY_CONNECTIONS_PER_ADDRESS", value_name = "NUMBER")]
    pub gateway_connections_per_address: Option<usize>,

    /// Refused signatures a minute, per route and source address; beyond it they get 429 and a closed connection. 0: no limit
    ///
    /// Only what failed its verification counts and is answered so: a request with a valid signature is never refused for it,
    /// whoever else comes from its address.
    #[arg(long, env = "GATEWAY_FAILURES_PER_MINUTE", value_name = "NUMBER", default_value_t = 600)]
    pub gateway_failures_per_minute: u32,

    /// Proxies of your own in front of the gateway, each of which appends the address it saw to X-Forwarded-For
    ///
    /// 0: the source is the address of the connection. More than there are lets strangers choose their address.
    #[arg(long, env = "GATEWAY_TRUSTED_HOPS", value_name = "NUMBER", default_value_t = 0)]
    pub gateway_trusted_hops: usize,

    /// Deliveries under way at once, waiting duplicates included; beyond it requests get 503 before the lock
    #[arg(long, env = "GATEWAY_DELIVERIES_MAX", value_name = "NUMBER", default_value_t = 1_024)]
    pub gateway_deliveries_max: usize,

    /// How long shutting down waits for deliveries under way; by default the application's time-out
    ///
    /// What is left then is recorded as timed out. The grace period of the pod has to be longer.
    #[arg(long, env = "GATEWAY_DRAIN", value_name = "DURATION", value_parser = duration)]
    pub gateway_drain: Option<Duration>,

    /// How long the statistics of the health page are kept
    #[arg(long, env = "GATEWAY_HEALTH_CACHE", value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub gateway_health_cache: Duration,

    /// How often files with secrets and certificates are looked at for changes
    #[arg(long, env = "GATEWAY_SECRET_RELOAD", value_name = "DURATION", default_value = "10s", value_parser = duration)]
    pub gateway_secret_reload: Duration,
}

impl Default for Options {
    /// The defaults of the manual. The environment is not read.
    fn default() -> Self {
        let command = Options::augment_args(Command::new("gateway").no_binary_name(true))
            .mut_args(|argument| argument.env(Resettable::Reset));
        let matches: ArgMatches = command.get_matches_from(std::iter::empty::<&str>());
        Options::from_arg_matches(&matches).expect("every required option has a default")
    }
}

impl Options {
    /// Checks everything and reads the files with secrets.
    ///
    /// # Errors
    ///
    /// All problems: what is missing (an application, a provider with a secret: G3), what does not parse, values
    /// outside their limits, and time-outs in the wrong order (G8, section 10 of the design; both values are named).
    pub fn validate(self) -> Result<Settings, Problems> {
        check::settings(self)
    }
}

/// The answer to a duplicate while the first delivery is under way (G6).
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum InProgressStatus {
    /// 409 with Retry-After.
    #[value(name = "409")]
    Conflict,
    /// 200, the answer of the first version: the payment is lost if the first delivery then fails.
    #[value(name = "200")]
    Ok,
}

/// The answer to an event that nobody may process (G6).
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeldStatus {
    /// 422.
    #[value(name = "422")]
    Unprocessable,
    /// 200: the provider stops retrying.
    #[value(name = "200")]
    Ok,
}

/// What a 3xx or other 4xx of the application means (G5).
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnRefusal {
    /// The next delivery may be tried.
    Retryable,
    /// The event is dead.
    Terminal,
}

/// What a time-out or a reset after sending means (G5).
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnUnclear {
    /// The next delivery may be tried: at once after a reset, but after a time-out only when the lock would have expired.
    Retryable,
    /// The event is held.
    Unknown,
}

/// The choices that each route has (G5, G6).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Policy {
    pub(crate) in_progress: InProgressStatus,
    pub(crate) held: HeldStatus,
    pub(crate) refusal: OnRefusal,
    pub(crate) unclear: OnUnclear,
}

/// Settings that fit together. Made by [`Options::validate`]. `Debug` shows no secret.
#[derive(Debug)]
pub struct Settings {
    /// Where the public listener binds.
    pub listen: SocketAddr,
    /// Where [`crate::sidecar::channel`] connects to.
    pub sidecar: Reach,
    /// TLS on the public listener.
    pub(crate) tls: Option<ServerTls>,
    pub(crate) routes: Vec<Route>,
    pub(crate) http: HttpLimits,
    pub(crate) body: BodyLimits,
    pub(crate) failures: FailureLimits,
    pub(crate) upstream: UpstreamLimits,
    pub(crate) lock: LockSettings,
    pub(crate) sidecar_timeout: Duration,
    pub(crate) wait_duration: Duration,
    pub(crate) answer_timeout: Duration,
    pub(crate) deliveries_max: usize,
    pub(crate) drain: Duration,
    pub(crate) health_cache: Duration,
    pub(crate) secret_reload: Duration,
    pub(crate) config_file: Option<ConfigFile>,
}

/// The file with routes, to be read again.
#[derive(Debug, Clone)]
pub(crate) struct ConfigFile {
    pub(crate) path: PathBuf,
    /// What holds if the file does not say.
    pub(crate) fallback: Enforcement,
}

/// What a running gateway takes over from the file, and a hash of everything else in it.
pub(crate) struct FileNow {
    pub(crate) enforcement: Vec<Enforcement>,
    pub(crate) rest: u64,
}

impl ConfigFile {
    /// The enforcement of `routes` by the file as it is now.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or what it says of enforcement cannot be used.
    pub(crate) fn now(&self, routes: &[Arc<Route>]) -> Result<FileNow, Problems> {
        let file = file::read(&self.path)?;
        let rest = file.rest();
        let general = file.enforcement.unwrap_or(self.fallback);
        let named = file.enforcement_by_path(general)?;
        let of = |route: &Arc<Route>| {
            named.iter().find(|(path, _)| *path == *route.path).map_or(general, |(_, enforcement)| *enforcement)
        };
        Ok(FileNow { enforcement: routes.iter().map(of).collect(), rest })
    }
}

#[derive(Debug, Clone)]
pub(crate) struct HttpLimits {
    pub(crate) connections_max: usize,
    /// None: no limit.
    pub(crate) connections_per_address: Option<NonZeroUsize>,
    pub(crate) first_byte_timeout: Duration,
    pub(crate) header_timeout: Duration,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct BodyLimits {
    pub(crate) bytes_max: usize,
    pub(crate) budget_bytes: usize,
    /// For bodies that are not verified yet. None: sources cannot be told apart.
    pub(crate) bytes_per_source: Option<usize>,
    pub(crate) timeout: Duration,
    pub(crate) first_byte_timeout: Duration,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct UpstreamLimits {
    pub(crate) connect_timeout: Duration,
    pub(crate) idle_timeout: Duration,
    pub(crate) body_bytes_max: usize,
    pub(crate) body_timeout: Duration,
}

#[derive(Debug, Clone)]
pub(crate) struct LockSettings {
    pub(crate) margin: Duration,
    pub(crate) holder: String,
}

#[cfg(test)]
mod tests;
