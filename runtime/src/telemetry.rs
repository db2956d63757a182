//! Traces by OpenTelemetry: which spans are made, where they go, and how their context travels.
//!
//! Without an endpoint there is no layer for spans, every span's call site is off for good, and a request pays one atomic
//! load for each. With one, finished spans go through a bounded queue to a thread of their own, with its own runtime:
//! nothing here needs a worker of the services' runtime, and a collector that is away, or hangs, costs spans and nothing
//! else.

mod context;
mod export;

use std::{fmt, str::FromStr, time::Duration};

use http::{HeaderName, Uri};
use opentelemetry::{
    Context, KeyValue, TraceId,
    trace::{self as otel, SpanKind, TracerProvider as _},
};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{
    Resource,
    trace::{Sampler, SamplingResult, SdkTracer, SdkTracerProvider, ShouldSample},
};
use tracing::Subscriber;
use tracing_subscriber::{Layer, filter, registry::LookupSpan};

pub(crate) use self::context::ids;
use self::export::Exporting;
pub use self::{
    context::{Link, continues, here, inject, link, linked},
    export::Spans,
};
use crate::{
    config::{Checks, Problem, Problems},
    secret::shown_url,
};

/// The name of the spans that belong to many traces by links and to none as a child. They are only created if one of their
/// calls is recorded, and are then always recorded, whatever the sampler decides about other roots.
pub const BATCH: &str = "ledger batch";

/// The longest that a process waits for the collector at its end. Part of the time that a pod is given to end.
pub const FLUSH_MAX: Duration = Duration::from_secs(2);

/// What becomes of spans in this process.
#[must_use]
pub fn spans() -> &'static Spans {
    &export::SPANS
}

/// Where traces go. The names are OpenTelemetry's, whose library reads `OTEL_EXPORTER_OTLP_HEADERS` and
/// `OTEL_RESOURCE_ATTRIBUTES` by itself.
#[derive(clap::Args, Debug, Clone)]
#[group(skip)]
#[command(next_help_heading = "Traces")]
pub struct Options {
    /// A collector that takes OTLP as http/protobuf, as http://collector:4318; /v1/traces is added [default: no traces]
    ///
    /// From the environment alone: headers for it (OTEL_EXPORTER_OTLP_HEADERS, as `authorization=Bearer%20token`), and what
    /// else is to be said about the service (OTEL_RESOURCE_ATTRIBUTES, as `deployment.environment.name=live`).
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    pub otel_exporter_otlp_endpoint: Option<Uri>,

    /// The same, used as it is
    #[arg(long, env = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", value_name = "URL")]
    pub otel_exporter_otlp_traces_endpoint: Option<Uri>,

    /// How long the collector may take to accept spans, in milliseconds
    #[arg(long, env = "OTEL_EXPORTER_OTLP_TIMEOUT", default_value_t = 10_000, value_name = "MS")]
    pub otel_exporter_otlp_timeout: u64,

    /// The service's name in traces [default: oncegate-sidecar, oncegate-gateway, or oncegate]
    #[arg(long, env = "OTEL_SERVICE_NAME", value_name = "NAME")]
    pub otel_service_name: Option<String>,

    /// Which traces are recorded: always_on, always_off, traceidratio, or one of them with parentbased_ before it, which
    /// follows the caller's decision where there is one
    #[arg(long, env = "OTEL_TRACES_SAMPLER", default_value = "parentbased_always_on", value_name = "SAMPLER")]
    pub otel_traces_sampler: SamplerName,

    /// The share of traces that traceidratio records, 0 to 1
    #[arg(long, env = "OTEL_TRACES_SAMPLER_ARG", default_value_t = 1.0, value_name = "RATIO")]
    pub otel_traces_sampler_arg: f64,
}

impl Options {
    /// Looks for what is wrong with the settings that are used.
    ///
    /// # Errors
    /// Everything that is wrong with them, at once.
    pub fn check(&self) -> Result<(), Problems> {
        let mut checks = Checks::new();
        // Only the one that is used: what a platform sets for everybody may be meant for another protocol.
        match (&self.otel_exporter_otlp_traces_endpoint, &self.otel_exporter_otlp_endpoint) {
            (Some(given), _) => checks.take(endpoint("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", given)),
            (None, Some(given)) => checks.take(endpoint("OTEL_EXPORTER_OTLP_ENDPOINT", given)),
            (None, None) => None,
        };
        checks.within("OTEL_TRACES_SAMPLER_ARG", self.otel_traces_sampler_arg, 0.0..=1.0);
        let traced = self.otel_exporter_otlp_traces_endpoint.is_some() || self.otel_exporter_otlp_endpoint.is_some();
        for setting in ["OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"] {
            if let Some(given) = std::env::var_os(setting).filter(|_| traced) {
                checks.take(headers(setting, &given.to_string_lossy()));
            }
        }
        checks.finish()
    }
}

/// Where spans go. What may hold a password is not repeated.
fn endpoint(setting: &'static str, given: &Uri) -> Result<(), Problem> {
    match given.authority() {
        Some(authority) if authority.as_str().contains('@') => Err(Problem::new(
            setting,
            "may not hold a user name or password: give the collector's credentials in OTEL_EXPORTER_OTLP_HEADERS",
        )),
        Some(_) if matches!(given.scheme_str(), Some("http" | "https")) => Ok(()),
        _ => {
            let shown = shown_url(&given.to_string());
            Err(Problem::new(setting, format!("{shown} given, has to be http://host:port or https://host:port")))
        }
    }
}

/// The library reads these by itself and silently leaves out what it cannot use. The values are secrets.
fn headers(setting: &'static str, given: &str) -> Result<(), Problem> {
    for (number, header) in given.split_terminator(',').enumerate().filter(|(_, header)| !header.trim().is_empty()) {
        let usable = header
            .split_once('=')
            .is_some_and(|(name, value)| name.trim().parse::<HeaderName>().is_ok() && !value.trim().is_empty());
        if !usable {
            let number = number + 1;
            let message = format!("header {number} of the list is not name=value, as in authorization=Bearer%20token");
            return Err(Problem::new(setting, message));
        }
    }
    Ok(())
}

/// A sampler's name in `OTEL_TRACES_SAMPLER`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SamplerName {
    root: Root,
    parent_based: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Root {
    On,
    Off,
    Ratio,
}

/// No sampler of that name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no sampler: always_on, always_off, traceidratio, or parentbased_ and one of these")]
pub struct SamplerError;

impl FromStr for SamplerName {
    type Err = SamplerError;

    fn from_str(text: &str) -> Result<Self, SamplerError> {
        let (name, parent_based) = match text.strip_prefix("parentbased_") {
            Some(name) => (name, true),
            None => (text, false),
        };
        let root = match name {
            "always_on" => Root::On,
            "always_off" => Root::Off,
            "traceidratio" => Root::Ratio,
            _ => return Err(SamplerError),
        };
        Ok(Self { root, parent_based })
    }
}

impl SamplerName {
    fn sampler(self, ratio: f64) -> Sampler {
        let root = match self.root {
            Root::On => Sampler::AlwaysOn,
            Root::Off => Sampler::AlwaysOff,
            Root::Ratio => Sampler::TraceIdRatioBased(ratio),
        };
        if self.parent_based { Sampler::ParentBased(Box::new(root)) } else { root }
    }
}

/// A sampler that records batches. See [`BATCH`].
#[derive(Clone, Debug)]
struct WithBatches(Sampler);

impl ShouldSample for WithBatches {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        trace_id: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[otel::Link],
    ) -> SamplingResult {
        let sampler = if name == BATCH { &Sampler::AlwaysOn } else { &self.0 };
        sampler.should_sample(parent, trace_id, name, kind, attributes, links)
    }
}

/// Why traces cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Settings that cannot be used.
    #[error(transparent)]
    Settings(#[from] Problems),
    /// OpenTelemetry's library refuses its settings.
    #[error("the exporter of traces cannot be made")]
    Exporter(#[source] ExporterBuildError),
    /// The collector is reached by https, and the system has no usable trust roots; or a thread cannot be had.
    #[error("the exporter of traces cannot be started")]
    System(#[source] std::io::Error),
}

/// Traces that are being exported.
pub struct Tracing {
    tracer: SdkTracer,
    exporting: Exporting,
}

impl fmt::Debug for Tracing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracing").finish_non_exhaustive()
    }
}

impl Tracing {
    /// Starts the exporter where an endpoint is given. `service` is the default of the service's name.
    ///
    /// # Errors
    /// When the settings cannot be used. A collector that cannot be reached is no error.
    pub fn start(options: &Options, service: &'static str) -> Result<Option<Self>, StartError> {
        options.check()?;
        let endpoint = match (&options.otel_exporter_otlp_traces_endpoint, &options.otel_exporter_otlp_endpoint) {
            (Some(exact), _) => exact.to_string(),
            (None, Some(base)) => format!("{}/v1/traces", base.to_string().trim_end_matches('/')),
            (None, None) => return Ok(None),
        };
        let secure = endpoint.starts_with("https:");
        let timeout = Duration::from_millis(options.otel_exporter_otlp_timeout.max(1));
        let client = export::HttpClient::new(secure, timeout).map_err(StartError::System)?;
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_endpoint(endpoint)
            .build()
            .map_err(StartError::Exporter)?;
        let name = options.otel_service_name.clone().unwrap_or_else(|| service.to_owned());
        let resource = Resource::builder()
            .with_service_name(name)
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let exporting = Exporting::start(exporter, &resource).map_err(StartError::System)?;
        let provider = SdkTracerProvider::builder()
            .with_resource(resource)
            .with_sampler(WithBatches(options.otel_traces_sampler.sampler(options.otel_traces_sampler_arg)))
            .with_span_processor(exporting.processor())
            .build();
        Ok(Some(Self { tracer: provider.tracer("oncegate"), exporting }))
    }

    /// The layer that makes our own spans; those of libraries, including the exporter's, are not recorded.
    pub(crate) fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'span> LookupSpan<'span>,
    {
        tracing_opentelemetry::layer()
            .with_tracer(self.tracer.clone())
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_level(false)
            .with_target(false)
            .with_filter(
                filter::filter_fn(|metadata| metadata.is_span() && metadata.target().starts_with("oncegate"))
                    .with_max_level_hint(filter::LevelFilter::INFO),
            )
    }

    /// Sends the spans gathered so far, for at most `limit`; any not sent by then are lost. Blocks the calling thread,
    /// which must not belong to a runtime.
    pub fn finish(self, limit: Duration) {
        self.exporting.finish(limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samplers_have_the_names_of_the_specification() {
        for (text, root, parent_based) in [
            ("always_on", Root::On, false),
            ("traceidratio", Root::Ratio, false),
            ("parentbased_always_off", Root::Off, true),
            ("parentbased_traceidratio", Root::Ratio, true),
        ] {
            assert_eq!(text.parse(), Ok(SamplerName { root, parent_based }), "{text}");
        }
        assert_eq!("sometimes".parse::<SamplerName>(), Err(SamplerError));
    }

    #[test]
    fn settings_that_would_be_left_out_in_silence_are_problems_and_no_secret_is_told() {
        for (given, taken) in [
            ("http://collector:4318", true),
            ("https://collector/base", true),
            ("collector:4318", false),
            ("collector", false),
            ("grpc://collector:4317", false),
            ("http://user:hunter2@collector:4318", false),
        ] {
            let endpoint = endpoint("X", &given.parse().unwrap());
            assert_eq!(endpoint.is_ok(), taken, "{given}");
            if let Err(problem) = endpoint {
                assert_eq!(problem.message.contains(given), !given.contains('@'), "{problem}");
                assert!(!problem.message.contains("hunter2"), "{problem}");
            }
        }
        for (given, taken) in [
            ("authorization=Bearer%20of-a-test,x-scope-orgid=a=b", true),
            ("", true),
            ("a=b,", true),
            ("hunter2", false),
            ("a=b,hunter2", false),
            ("=hunter2", false),
            ("a b=hunter2", false),
            ("a=", false),
        ] {
            let headers = headers("X", given);
            assert_eq!(headers.is_ok(), taken, "{given}");
            assert!(headers.err().is_none_or(|problem| !problem.message.contains("hunter2")));
        }
    }
}
