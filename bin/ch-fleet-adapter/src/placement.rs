//! OpenStack placement: the inventory of a resource provider, and a trait that names the host's state.
//!
//! Every write names the generation that was read. If another client wrote in between, placement rejects the write with
//! 409, and everything is read again (<https://docs.openstack.org/api-ref/placement/>). The total already includes
//! overcommit, so the allocation ratio is 1.

use serde_json::{Value, json};
use strum::VariantArray as _;

use crate::http::{Answer, Http, HttpError, Service, TokenHeader};
use crate::offer::{Offer, State};

/// The first version in which the whole total may be reserved, which withdraws it.
const VERSION: (&str, &str) = ("OpenStack-API-Version", "placement 1.26");
const JSON: (&str, &str) = ("Content-Type", "application/json");
/// Number of attempts if other clients make conflicting changes.
const ATTEMPTS: u32 = 5;
const CONFLICT: u16 = 409;
const NOT_FOUND: u16 = 404;
/// Placement's error code for a changed generation.
const CONCURRENT: &str = "placement.concurrent_update";
/// Prefix of our traits; other traits are left unchanged.
const TRAIT_PREFIX: &str = "CUSTOM_CH_FLEET_";
/// Prefix of resource classes that are not placement's own.
const CUSTOM: &str = "CUSTOM_";

/// One resource provider.
#[derive(Debug)]
pub(crate) struct Placement {
    http: Http,
    provider: String,
    class: String,
    /// Whether a missing provider is created.
    create: bool,
    /// Its id, if known.
    uuid: Option<String>,
    /// Whether our traits and the resource class have been registered.
    introduced: bool,
}

impl Placement {
    pub(crate) fn new(
        service: &Service,
        provider: &str,
        class: &str,
        create: bool,
    ) -> Result<Self, HttpError> {
        Ok(Self {
            http: Http::new(service, TokenHeader("X-Auth-Token", ""))?,
            provider: provider.to_owned(),
            class: class.to_owned(),
            create,
            uuid: None,
            introduced: false,
        })
    }

    pub(crate) fn publish(&mut self, offer: &Offer) -> Result<(), HttpError> {
        self.introduce()?;
        let path = format!("/resource_providers/{}", self.uuid()?);
        let published = self
            .publish_inventory(&path, offer)
            .and_then(|()| self.publish_state(&path, offer.state));
        if let Err(HttpError::Refused {
            status: NOT_FOUND, ..
        }) = published
        {
            // The provider was removed, and possibly recreated with another id.
            self.uuid = None;
        }
        published
    }

    /// Registers our traits and the resource class. Registering them again has no effect.
    fn introduce(&mut self) -> Result<(), HttpError> {
        if self.introduced {
            return Ok(());
        }
        for &state in State::VARIANTS {
            let path = format!("/traits/{}", trait_of(state));
            self.send("PUT", &path, None)?.good()?;
        }
        if self.class.starts_with(CUSTOM) {
            let path = format!("/resource_classes/{}", self.class);
            self.send("PUT", &path, None)?.good()?;
        }
        self.introduced = true;
        Ok(())
    }

    fn uuid(&mut self) -> Result<String, HttpError> {
        if let Some(uuid) = &self.uuid {
            return Ok(uuid.clone());
        }
        let path = format!("/resource_providers?name={}", self.provider);
        let found = self.send("GET", &path, None)?.good()?;
        let provider = match &found["resource_providers"][0] {
            Value::Null if self.create => {
                let new = json!({"name": self.provider});
                self.send("POST", "/resource_providers", Some(&new))?
                    .good()?
            }
            Value::Null => {
                return Err(HttpError::Missing(format!(
                    "Placement has no resource provider {:?}; --create creates it",
                    self.provider
                )));
            }
            found => found.clone(),
        };
        let uuid = provider["uuid"]
            .as_str()
            .ok_or_else(|| HttpError::Missing("The resource provider has no id".to_owned()))?;
        self.uuid = Some(uuid.to_owned());
        Ok(uuid.to_owned())
    }

    fn publish_inventory(&self, provider: &str, offer: &Offer) -> Result<(), HttpError> {
        let path = format!("{provider}/inventories");
        let wanted = inventory(offer);
        self.changed(&path, |read| {
            let (there, generation) = (&read["inventories"][&self.class], generation_of(read));
            if contains(there, &wanted) {
                return None;
            }
            let mut body = wanted.clone();
            body["resource_provider_generation"] = generation;
            if there.is_null() {
                body["resource_class"] = json!(self.class);
                Some(("POST", path.clone(), body))
            } else {
                Some(("PUT", format!("{path}/{}", self.class), body))
            }
        })
    }

    fn publish_state(&self, provider: &str, state: State) -> Result<(), HttpError> {
        let path = format!("{provider}/traits");
        self.changed(&path, |read| {
            let names = read["traits"].as_array().into_iter().flatten();
            let there: Vec<&str> = names.filter_map(Value::as_str).collect();
            let (ours, mut others): (Vec<_>, Vec<_>) = there
                .into_iter()
                .partition(|name| name.starts_with(TRAIT_PREFIX));
            let wanted = trait_of(state);
            if ours == [wanted.as_str()] {
                return None;
            }
            others.push(&wanted);
            let body = json!({
                "traits": others,
                "resource_provider_generation": generation_of(read),
            });
            Some(("PUT", path.clone(), body))
        })
    }

    /// Reads `path` and writes the result of `change`. Repeats both if another client wrote in between.
    fn changed(
        &self,
        path: &str,
        change: impl Fn(&Value) -> Option<(&'static str, String, Value)>,
    ) -> Result<(), HttpError> {
        for _ in 0..ATTEMPTS {
            let read = self.send("GET", path, None)?.good()?;
            let Some((method, to, body)) = change(&read) else {
                return Ok(());
            };
            let answer = self.send(method, &to, Some(&body))?;
            if answer.status != CONFLICT || answer.body["errors"][0]["code"] != CONCURRENT {
                return answer.good().map(drop);
            }
        }
        Err(HttpError::Contended {
            path: path.to_owned(),
            attempts: ATTEMPTS,
        })
    }

    fn send(
        &self,
        method: &'static str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Answer, HttpError> {
        self.http.send(method, path, &[VERSION, JSON], body)
    }
}

fn trait_of(state: State) -> String {
    format!("{TRAIT_PREFIX}{}", state.name().to_uppercase())
}

fn generation_of(read: &Value) -> Value {
    read["resource_provider_generation"].clone()
}

/// The inventory of an offer. A total of 0 is not allowed; instead, the total is 1 MiB, which is reserved.
fn inventory(offer: &Offer) -> Value {
    let total = offer.capacity_mib();
    json!({
        "total": total.max(1),
        "reserved": u64::from(total == 0),
        "min_unit": 1,
        "max_unit": total.max(1),
        "step_size": 1,
        "allocation_ratio": 1.0,
    })
}

/// Whether `there` has every value in `wanted`.
fn contains(there: &Value, wanted: &Value) -> bool {
    let fields = wanted.as_object().into_iter().flatten();
    fields
        .into_iter()
        .all(|(name, value)| there[name] == *value)
}

#[cfg(test)]
mod tests;
