//! The file with routes, in TOML. Settings are read together with their lines, so that every problem names its line.

use std::{
    borrow::Cow,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::ValueEnum;
use oncegate_api::limits::{LOCK_DURATION_MAX, LOCK_DURATION_MIN};
use oncegate_runtime::{
    config::{Checks, Problem, Problems, ShownDuration, duration},
    reload::read_text,
    secret::SecretSource,
};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    Enforcement, Options, Policy,
    check::{CONNECT_FIRST, TIMEOUTS},
    routes::{
        PAYPAL_TOLERANCE_MAX, PREFIX, Scheme, Signing, TOLERANCE_MAX, outlasted, outlasts, provider, several, signer,
        tenant, url,
    },
};
use crate::{
    enforcement::Switch,
    providers::{Provider, ProviderKind},
    route::{Application, Route, Secrets},
};

/// The keys that the file may hold.
const ROUTE: &str = "route";
const ENFORCEMENT: &str = "enforcement";

/// What holds for a route that says nothing else.
pub(super) struct Defaults<'a> {
    pub(super) options: &'a Options,
    pub(super) tenant: &'a str,
    /// None where it cannot be used, which has been said, or need not be.
    pub(super) application: Option<&'a Application>,
    /// Signs for routes with an application of their own as well. None where its secret cannot be used, which has been said.
    pub(super) signing: Option<&'a Signing>,
    pub(super) policy: Policy,
    pub(super) enforcement: Enforcement,
}

/// The file, parsed.
pub(super) struct File {
    path: PathBuf,
    routes: Vec<Table>,
    /// For all routes without a setting of their own, including those that the settings make.
    pub(super) enforcement: Option<Enforcement>,
}

/// The entries of a table, with their lines.
struct Table {
    line: usize,
    entries: Vec<Entry>,
}

struct Entry {
    key: String,
    line: usize,
    value: Value,
    /// Whether somebody asked for it.
    taken: bool,
}

#[derive(Hash)]
enum Value {
    Text(String),
    Texts(Vec<String>),
    Other,
}

/// Reads the file and checks its form.
pub(super) fn read(path: &Path) -> Result<File, Problems> {
    let problem = |place: Cow<'static, str>, message: String| Problems::from(Problem::new(place, message));
    let text = read_text(path)
        .map_err(|error| problem("ONCEGATE_CONFIG".into(), format!("cannot read {}: {error}", path.display())))?;
    let at = |start: usize| text.as_bytes().iter().take(start).filter(|&&byte| byte == b'\n').count() + 1;
    let place = |line: usize, what: &str| -> Cow<'static, str> { format!("{}:{line}{what}", path.display()).into() };
    let (table, errors) = DeTable::parse_recoverable(&text);
    let mut checks = Checks::new();
    for error in errors {
        // The message says what is wrong. The error's quotation from the file is left out: it may be a secret.
        checks.problem(place(error.span().map_or(1, |span| at(span.start)), ""), error.message().to_owned());
    }
    let mut routes = Vec::new();
    let mut enforcement = None;
    for (key, value) in table.get_ref() {
        let line = at(key.span().start);
        match value.get_ref() {
            DeValue::Array(tables) if key.get_ref() == ROUTE => {
                for table in tables {
                    match table.get_ref() {
                        DeValue::Table(entries) => routes.push(read_table(at(table.span().start), entries, &at)),
                        _ => checks.problem(place(line, " route"), "has to be a table: write [[route]]"),
                    }
                }
            }
            _ if key.get_ref() == ROUTE => {
                checks.problem(place(line, " route"), "has to be a list of tables: write [[route]] instead of [route]");
            }
            value if key.get_ref() == ENFORCEMENT => match value.as_str().map(choice) {
                Some(Ok(chosen)) => enforcement = Some(chosen),
                Some(Err(message)) => checks.problem(place(line, " enforcement"), message),
                None => checks.problem(place(line, " enforcement"), "has to be a text"),
            },
            _ => checks.problem(
                place(line, &format!(" {}", key.get_ref())),
                "no such setting; there are only enforcement and [[route]]",
            ),
        }
    }
    checks.finish()?;
    if routes.is_empty() && enforcement.is_none() {
        return Err(problem(place(1, ""), "holds no [[route]]".to_owned()));
    }
    Ok(File { path: path.to_owned(), routes, enforcement })
}

fn read_table(line: usize, entries: &DeTable<'_>, at: &dyn Fn(usize) -> usize) -> Table {
    let entry = |(key, value): (&Spanned<toml::de::DeString<'_>>, &Spanned<DeValue<'_>>)| {
        let text = |value: &DeValue<'_>| match value {
            DeValue::String(text) => Some(text.to_string()),
            // Statuses, which are numbers.
            DeValue::Integer(number) => Some(number.to_string()),
            _ => None,
        };
        let value = match value.get_ref() {
            DeValue::Array(values) => values
                .iter()
                .map(|value| value.get_ref().as_str().map(str::to_owned))
                .collect::<Option<_>>()
                .map_or(Value::Other, Value::Texts),
            value => text(value).map_or(Value::Other, Value::Text),
        };
        Entry { key: key.get_ref().to_string(), line: at(key.span().start), value, taken: false }
    };
    let mut entries: Vec<_> = entries.iter().map(entry).collect();
    entries.sort_by_key(|entry| entry.line);
    Table { line, entries }
}

impl File {
    pub(super) fn has_routes(&self) -> bool {
        !self.routes.is_empty()
    }

    /// Whether there are routes, and none of them needs the application of the settings.
    pub(super) fn names_every_application(&self) -> bool {
        self.has_routes()
            && self.routes.iter().all(|table| table.entries.iter().any(|entry| entry.key == "upstream_url"))
    }

    /// A hash of everything but enforcement, layout and comments.
    pub(super) fn rest(&self) -> u64 {
        let mut hash = DefaultHasher::new();
        for route in &self.routes {
            let mut entries: Vec<_> = route.entries.iter().filter(|entry| entry.key != ENFORCEMENT).collect();
            entries.sort_by_key(|entry| &entry.key);
            hash.write_usize(entries.len());
            for entry in entries {
                (&entry.key, &entry.value).hash(&mut hash);
            }
        }
        hash.finish()
    }

    /// The enforcement of the file's routes, by path; `general` for those that say nothing.
    pub(super) fn enforcement_by_path(self, general: Enforcement) -> Result<Vec<(String, Enforcement)>, Problems> {
        let mut checks = Checks::new();
        let Self { path, routes, .. } = self;
        let mut named = Vec::with_capacity(routes.len());
        for table in routes {
            let mut reader = Reader { path: &path, table, checks: &mut checks };
            let enforcement = reader.choice(ENFORCEMENT).unwrap_or(general);
            named.extend(reader.route_path().map(|path| (path, enforcement)));
        }
        checks.finish().map(|()| named)
    }

    /// The routes, or all problems with them.
    pub(super) fn routes(self, defaults: &Defaults<'_>) -> Result<Vec<Route>, Problems> {
        let mut checks = Checks::new();
        let Self { path, routes, .. } = self;
        let routes = routes
            .into_iter()
            .filter_map(|table| Reader { path: &path, table, checks: &mut checks }.route(defaults))
            .collect();
        checks.finish().map(|()| routes)
    }
}

/// Takes a route's settings one by one. What is left at the end are unknown settings.
struct Reader<'a> {
    path: &'a Path,
    table: Table,
    checks: &'a mut Checks,
}

/// A setting that was found, with its name for messages.
struct Found<T> {
    name: Cow<'static, str>,
    value: T,
}

impl Reader<'_> {
    /// None only together with a problem, which may be that of the settings' application.
    fn route(mut self, defaults: &Defaults<'_>) -> Option<Route> {
        let path = self.route_path();
        let tenant = match self.text("tenant") {
            Some(found) => self.checks.take(tenant(found.name, &found.value)),
            // A problem with it has been reported.
            None => tenant("GATEWAY_TENANT", defaults.tenant).ok(),
        };
        let kind = self.choice::<ProviderKind>("provider");
        if kind.is_none() && !self.said("provider") {
            self.missing("provider", "name one of stripe, paypal, flutterwave, paystack and standard_webhooks");
        }
        let provider = kind.and_then(|kind| self.provider(kind, defaults.options));
        let application = self.application(defaults);
        let policy = self.policy(defaults.policy);
        let enforcement = Switch::new(self.choice(ENFORCEMENT).unwrap_or(defaults.enforcement));
        self.unknown(kind);
        let (provider, secrets) = provider?;
        Some(Route {
            path: path?.into(),
            tenant: tenant?,
            provider,
            secrets,
            application: application?,
            policy,
            enforcement,
        })
    }

    fn route_path(&mut self) -> Option<String> {
        let (path, name) = (self.text("path"), self.text("name"));
        let (found, path) = match (path, name) {
            (Some(path), None) => (path.name, path.value),
            (None, Some(name)) => {
                let path = format!("{PREFIX}{}", name.value);
                (name.name, path)
            }
            (Some(path), Some(_)) => {
                self.checks.problem(path.name, "given beside name: keep one");
                return None;
            }
            (None, None) => {
                self.missing("path", "write path = \"/webhooks/payments/...\", or name for the last part of that");
                return None;
            }
        };
        let permitted = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'.' | b'_' | b'-' | b'~');
        let segments = path.strip_prefix('/').unwrap_or_default();
        if segments.split('/').any(|part| matches!(part, "" | "." | "..")) || !path.bytes().all(permitted) {
            self.checks.problem(
                found,
                format!(
                    "{path:?} is no path: it begins with / and has letters, digits, dots, underscores, hyphens and ~"
                ),
            );
            return None;
        }
        if path == crate::server::HEALTH_PATH {
            self.checks.problem(found, format!("{path} is the health page"));
            return None;
        }
        Some(path)
    }

    fn provider(&mut self, kind: ProviderKind, options: &Options) -> Option<(Provider, Secrets)> {
        let mut scheme = Scheme::new(kind, options);
        match kind {
            ProviderKind::Stripe | ProviderKind::StandardWebhooks => {
                scheme.tolerance = self.tolerance(TOLERANCE_MAX).or(scheme.tolerance);
            }
            ProviderKind::PayPal => {
                scheme.tolerance = self.tolerance(PAYPAL_TOLERANCE_MAX).or(scheme.tolerance);
                scheme.environment = self.choice("environment").unwrap_or(scheme.environment);
                scheme.cert_dir = self.file("cert_dir").or(scheme.cert_dir);
                scheme.trust_anchors_file = self.file("trust_anchors_file").or(scheme.trust_anchors_file);
                scheme.intermediates_file = self.file("intermediates_file").or(scheme.intermediates_file);
            }
            ProviderKind::Flutterwave => scheme.signature = self.choice("signature").or(scheme.signature),
            ProviderKind::Paystack => {}
        }
        let source = match self.secrets("secrets", "secrets_file")? {
            Some(source) => source,
            None => {
                // G3: a route that can verify nothing would refuse everything.
                self.missing("secrets", "and neither is secrets_file: without a secret no webhook can be verified");
                return None;
            }
        };
        let places: Vec<_> = self.place_names();
        let fallback = self.place(self.table.line, "");
        let name = |of: &'static str| {
            let known = places.iter().find(|(key, _)| key == of || (of == "secrets" && key == "secrets_file"));
            known.map_or_else(|| Cow::Owned(format!("{fallback} {of}")), |(_, place)| place.clone())
        };
        provider(kind, source, &scheme, &name, self.checks)
    }

    fn tolerance(&mut self, most: Duration) -> Option<Duration> {
        let found = self.duration("tolerance")?;
        self.within(&found, ShownDuration(Duration::from_secs(1))..=ShownDuration(most));
        Some(found.value)
    }

    fn application(&mut self, defaults: &Defaults<'_>) -> Option<Application> {
        let url = self.text("upstream_url").map(|found| self.checks.take(url(found.name, &found.value)));
        let signing = match self.secrets("upstream_secret", "upstream_secret_file") {
            None => None,
            Some(None) => defaults.signing.cloned(),
            Some(Some(source)) => {
                let name = self.place(self.table.line, " upstream_secret");
                signer(&name, source, self.checks)
            }
        };
        let options = defaults.options;
        let timeout = self.duration("upstream_timeout");
        if let Some(found) = &timeout {
            let (least, most) = TIMEOUTS.into_inner();
            self.within(found, ShownDuration(least)..=ShownDuration(most));
            if found.value <= options.upstream_connect_timeout {
                let (given, connect) = (ShownDuration(found.value), ShownDuration(options.upstream_connect_timeout));
                self.checks.problem(
                    found.name.clone(),
                    format!(
                        "{given} given, has to be more than UPSTREAM_CONNECT_TIMEOUT, which is {connect}: {CONNECT_FIRST}"
                    ),
                );
            }
        }
        let lock = self.duration("lock_duration");
        if let Some(found) = &lock {
            self.within(found, ShownDuration(LOCK_DURATION_MIN)..=ShownDuration(LOCK_DURATION_MAX));
        }
        let lock_name = lock.as_ref().map_or("GATEWAY_LOCK_DURATION", |_| "lock_duration");
        let lock_value = lock.as_ref().map_or(options.gateway_lock_duration, |found| found.value);
        let timeout_value = timeout.as_ref().map_or(options.upstream_timeout, |found| found.value);
        let margin = options.gateway_lock_margin;
        match (timeout, lock) {
            (Some(timeout), _) => outlasts((timeout.name, timeout_value), (lock_name, lock_value), margin, self.checks),
            (None, Some(lock)) => outlasted((lock.name, lock_value), timeout_value, margin, self.checks),
            // Those of the settings, which are checked among themselves.
            (None, None) => {}
        }
        let url = match url {
            Some(url) => url?,
            None => defaults.application?.url.clone(),
        };
        let Signing { signer, secrets: signer_secrets } = signing?;
        Some(Application { url, signer, signer_secrets, timeout: timeout_value, lock_duration: lock_value })
    }

    fn policy(&mut self, default: Policy) -> Policy {
        Policy {
            in_progress: self.choice("in_progress_status").unwrap_or(default.in_progress),
            held: self.choice("held_status").unwrap_or(default.held),
            refusal: self.choice("upstream_refusal").unwrap_or(default.refusal),
            unclear: self.choice("upstream_unclear").unwrap_or(default.unclear),
        }
    }

    /// Secrets, from this file or another one. `Some(None)` if there are none, `None` together with a problem.
    fn secrets(&mut self, key: &'static str, key_file: &'static str) -> Option<Option<SecretSource>> {
        let inline = self.take(key);
        let file = self.file(key_file);
        let inline = match inline {
            None => None,
            Some((name, Value::Text(text))) => Some((name, vec![text])),
            Some((name, Value::Texts(texts))) => Some((name, texts)),
            Some((name, Value::Other)) => {
                self.checks.problem(name, "has to be a text, or a list of texts");
                return None;
            }
        };
        match (inline, file) {
            (Some((name, _)), Some(_)) => {
                self.checks.problem(name, format!("given beside {key_file}: keep one"));
                None
            }
            (Some((name, texts)), None) => match several(&texts) {
                Some(source) => Some(Some(source)),
                None => {
                    self.checks.problem(name, "holds no secret");
                    None
                }
            },
            (None, file) => Some(file.map(SecretSource::File)),
        }
    }

    /// A path, as seen from where the file with the routes is. A blank one is not set, as in the environment: joined, it would
    /// be the directory of the file.
    fn file(&mut self, key: &'static str) -> Option<PathBuf> {
        let found = self.text(key).filter(|found| !found.value.trim().is_empty())?;
        Some(self.path.parent().unwrap_or(Path::new("")).join(found.value))
    }

    fn duration(&mut self, key: &'static str) -> Option<Found<Duration>> {
        let found = self.text(key)?;
        let parsed = duration(&found.value).map_err(|error| Problem::from_error(found.name.clone(), &error));
        self.checks.take(parsed).map(|value| Found { name: found.name, value })
    }

    fn choice<T: ValueEnum>(&mut self, key: &'static str) -> Option<T> {
        let found = self.text(key)?;
        self.checks.take(choice(&found.value).map_err(|message| Problem::new(found.name, message)))
    }

    fn text(&mut self, key: &'static str) -> Option<Found<String>> {
        match self.take(key)? {
            (name, Value::Text(value)) => Some(Found { name, value }),
            (name, Value::Texts(_) | Value::Other) => {
                self.checks.problem(name, "has to be a text");
                None
            }
        }
    }

    fn within(&mut self, found: &Found<Duration>, permitted: std::ops::RangeInclusive<ShownDuration>) {
        if !permitted.contains(&ShownDuration(found.value)) {
            let (least, most) = (permitted.start(), permitted.end());
            let message = format!("{} given, permitted is {least} to {most}", ShownDuration(found.value));
            self.checks.problem(found.name.clone(), message);
        }
    }

    /// Takes a setting's value; its line stays known.
    fn take(&mut self, key: &str) -> Option<(Cow<'static, str>, Value)> {
        let index = self.table.entries.iter().position(|entry| entry.key == key && !entry.taken)?;
        let name = self.place(self.table.entries[index].line, &format!(" {key}"));
        let entry = &mut self.table.entries[index];
        let value = std::mem::replace(&mut entry.value, Value::Other);
        entry.taken = true;
        Some((name, value))
    }

    fn said(&self, key: &str) -> bool {
        self.table.entries.iter().any(|entry| entry.key == key)
    }

    fn place_names(&self) -> Vec<(String, Cow<'static, str>)> {
        let name = |entry: &Entry| (entry.key.clone(), self.place(entry.line, &format!(" {}", entry.key)));
        self.table.entries.iter().map(name).collect()
    }

    fn missing(&mut self, key: &str, advice: &str) {
        let name = self.place(self.table.line, &format!(" {key}"));
        self.checks.problem(name, format!("not set: {advice}"));
    }

    /// A setting that nobody asked for is a slip of the pen, and its author believes that it takes effect.
    fn unknown(&mut self, kind: Option<ProviderKind>) {
        // Without a provider nobody knows which settings belong to it.
        let particular =
            ["tolerance", "signature", "environment", "cert_dir", "trust_anchors_file", "intermediates_file"];
        let general = ["secrets", "secrets_file"];
        let left: Vec<_> = self
            .table
            .entries
            .iter()
            .filter(|entry| !entry.taken)
            .filter(|entry| kind.is_some() || !particular.iter().chain(&general).any(|key| *key == entry.key))
            .map(|entry| (entry.key.clone(), entry.line))
            .collect();
        for (key, line) in left {
            let message = match kind.and_then(|kind| kind.to_possible_value()) {
                Some(kind) if particular.contains(&key.as_str()) => format!("not a setting of {}", kind.get_name()),
                _ => "no such setting of a route".to_owned(),
            };
            let name = self.place(line, &format!(" {key}"));
            self.checks.problem(name, message);
        }
    }

    fn place(&self, line: usize, what: &str) -> Cow<'static, str> {
        format!("{}:{line}{what}", self.path.display()).into()
    }
}

/// One of the permitted values, or a sentence that names them.
fn choice<T: ValueEnum>(text: &str) -> Result<T, String> {
    T::from_str(text, false).map_err(|_| {
        let known: Vec<_> = T::value_variants().iter().filter_map(ValueEnum::to_possible_value).collect();
        let known: Vec<_> = known.iter().map(|value| value.get_name()).collect();
        format!("{text:?} given, permitted are {}", known.join(", "))
    })
}
